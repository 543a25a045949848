"""Parameters that are no layer's weight (`target_parameters`): the weights of all experts of a mixture in one slab."""

from __future__ import annotations

from typing import Any

from torch import nn

from trimtab.bases._parts import Part, Parts
from trimtab.core.base import Base, base
from trimtab.core.ops import OpaqueOp
from trimtab.errors import NotSupported


class ExpertsOp(OpaqueOp):
    kind = "experts"


@base("parameters")
class Parameters(Base):
    """The named parameters of a module: (out, in), or a slab (experts, out, in); (experts, in, out) where the module says
    `is_transposed`. Files nest what they hold: the first of a module's parameters is the innermost."""

    def __init__(self, layer: nn.Module, names: list[str] = []) -> None:  # noqa: B006 - never changed
        if parametrised := [n for n in names if n in getattr(layer, "parametrizations", {})]:
            raise NotSupported(
                f"{parametrised[0]!r} of a {type(layer).__name__} is computed from other tensors, as 4-bit experts are, so an"
                " adapter cannot be added to it. Load the model with this layer unquantised"
            )
        turned: Any = getattr(layer, "is_transposed", False)
        self.parts = {
            n: Part(layer, n, "base_layer." * (len(names) - 1 - i), turned=turned and layer.get_parameter(n).dim() == 3)
            for i, n in enumerate(names)
        }
        super().__init__(layer, ExpertsOp(layer), next(iter(self.parts.values())).shape)

    def adapt(self, method: Any, cfg: Any, site: Any) -> Parts:
        return Parts(method, cfg, site)
