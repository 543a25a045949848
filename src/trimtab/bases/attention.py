"""torch's nn.MultiheadAttention, whose four projections are parameters that no layer's forward uses."""

from __future__ import annotations

from typing import Any

from torch import nn

from trimtab.bases._parts import Part, Parts
from trimtab.core.base import Base, Opaque, base
from trimtab.core.ops import OpaqueOp


class AttentionOp(OpaqueOp):
    kind = "attention"


@base("torch.nn.modules.activation.MultiheadAttention")
class Attention(Base):
    """in_proj_weight (3 dim, dim), or, where keys and values have their own dimensions, a weight for each of the three; and
    out_proj.weight (dim, dim). A method adapts all of them."""

    def __init__(self, layer: Any) -> None:
        self.parts = {n: Part(layer, n, p) for n, p in _places(layer).items()}
        super().__init__(layer, AttentionOp(layer), next(iter(self.parts.values())).shape)

    def adapt(self, method: Any, cfg: Any, site: Any) -> Parts:
        return Parts(method, cfg, site)


def _places(layer: nn.MultiheadAttention) -> dict[str, str]:
    """Where files hold the adapter of each weight."""
    one = "in_proj_weight" in dict(layer.named_parameters())
    own = {"in_proj_weight": ""} if one else {f"{n}_proj_weight": f"{n}_proj." for n in "qkv"}
    return own | {"out_proj.weight": "base_layer.out_proj."}


@base("torch.nn.modules.transformer.TransformerEncoderLayer", "torch.nn.modules.transformer.TransformerEncoder")
class Encoder(Opaque):
    """In eval mode torch's encoder reads the weights of its layers past them, and so past their adapters. It is told not to."""

    def pin(self) -> None:
        layer: Any = self.layer
        if isinstance(layer, nn.TransformerEncoder):
            layer.use_nested_tensor = False  # what the layers' slow path cannot read
        else:
            layer.activation_relu_or_gelu = 0  # for an activation of another kind there is no fast path
