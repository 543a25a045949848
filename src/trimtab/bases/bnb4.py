"""bitsandbytes 4-bit linear layers (NF4 and FP4, with or without double quantisation)."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.base import Base, base
from trimtab.core.ops import LinearOp


@base("bitsandbytes.nn.modules.Linear4bit")
class Bnb4(Base):
    """weight: dequantised, in the dtype the layer was quantised from;  rebuild: quantises again with the layer's settings.

    On a CPU with AVX512-BF16 bitsandbytes repacks the weight at the first forward without gradient. Its own dequantiser
    misreads that form, and its packed matmul passes no gradient on; so layers are held in the one form that is right.
    """

    tolerance = 2e-2  # the kernel multiplies in bfloat16

    def __init__(self, layer: Any) -> None:
        super().__init__(layer, LinearOp(layer), (layer.out_features, layer.in_features))

    @property
    def dtype(self) -> torch.dtype:
        layer: Any = self.layer
        return layer.compute_dtype or self._state().dtype

    def _state(self) -> Any:
        layer: Any = self.layer
        return layer.weight.quant_state if layer.weight.quant_state is not None else layer.quant_state

    def pin(self) -> None:
        layer: Any = self.layer
        layer.support_avx512bf16_for_cpu = False
        if getattr(self._state(), "packing_format_for_cpu", False):
            layer.weight.data, layer.weight.quant_state = self._unpacked()
            layer.quant_state = layer.weight.quant_state

    def _unpacked(self) -> tuple[Tensor, Any]:
        """Codes and state as they were before packing, but for the block scales, which packing rounds to bfloat16."""
        from bitsandbytes.functional import QuantState, _convert_weight_packed_for_cpu_inverse

        packed, layer = self._state(), self.layer
        plain = copy.copy(packed)  # the inverse writes into the state it is given
        plain.original_nested = False
        codes, _ = _convert_weight_packed_for_cpu_inverse(layer.weight.data, plain)  # type: ignore[union-attr,arg-type]
        scales = packed.absmax.T.reshape(-1).float()
        return codes, QuantState(
            scales, packed.shape, packed.code, packed.blocksize, packed.quant_type, packed.original_dtype
        )

    def weight(self) -> Tensor:
        from bitsandbytes.functional import dequantize_4bit

        self.pin()
        return dequantize_4bit(self.layer.weight.data, self._state())  # type: ignore[union-attr,arg-type]

    def rebuild(self, w: Tensor, b: Tensor | None) -> nn.Module:
        from bitsandbytes.nn.modules import Params4bit

        old: Any = self.layer.weight
        state = self._state()
        new: Any = copy.copy(self.layer)
        new._parameters = dict(self.layer._parameters)
        make: Any = Params4bit
        new.weight = make(
            w.detach().to(state.dtype).contiguous().cpu(),
            requires_grad=False,
            compress_statistics=old.compress_statistics,
            blocksize=state.blocksize,
            quant_type=state.quant_type,
            quant_storage=old.quant_storage,
            module=new,
        ).to(self.device)
        new.bias = None if b is None else nn.Parameter(b.detach().to(self.dtype), requires_grad=False)
        return new
