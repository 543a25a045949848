"""Bottleneck adapters: a small network behind, or beside, the blocks of a layer."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from trimtab.core.adapter import Site
from trimtab.core.config import in_range, method, one_of, option
from trimtab.methods._blocks import NON_LINEAR, Around, BlockConfig

_INITS = ["bert", "mam_adapter", "houlsby"]


@dataclass(kw_only=True)
class BottleneckConfig(BlockConfig):
    reduction_factor: float = option(16.0, "width of the block over that of the bottleneck")
    non_linearity: str = option("swish", f"one of {', '.join(NON_LINEAR)}", choices=["relu", "tanh"])
    init_weights: str = option("bert", f"the start, one of {', '.join(_INITS)}; mam_adapter: the base", choices=_INITS)

    def __post_init__(self) -> None:
        super().__post_init__()
        in_range("reduction_factor", self.reduction_factor, 1e-3)
        one_of("non_linearity", self.non_linearity, list(NON_LINEAR))
        one_of("init_weights", self.init_weights, _INITS)


@method("BOTTLENECK", config=BottleneckConfig, small={"reduction_factor": 2})
class Bottleneck(Around):
    """y' = y + s (U act(D z + d) + u),  z = y or x                      arXiv:1902.00751, 2005.00247, 2110.04366, eq. 2-4

    D (width / reduction_factor, width) and U back. Behind attention and feed-forward: Houlsby. mh_adapter=False,
    original_ln_before=True: Pfeiffer. mh_adapter=False, is_parallel=True, scaling=4: He, with z = x.
    """

    def __init__(self, cfg: BottleneckConfig, site: Site) -> None:
        super().__init__(cfg, site)
        self.starts_at_base = cfg.init_weights == "mam_adapter"
        size = max(1, int(self.out // cfg.reduction_factor))
        self.adapter_down = nn.Sequential(nn.Linear(self.inn, size), self.non_linear)
        self.adapter_up = nn.Linear(size, self.out)
        for name, linear in (("adapter_down", self.adapter_down[0]), ("adapter_up", self.adapter_up)):
            w, draw = linear.weight, site.generator(name)
            nn.init.zeros_(linear.bias)  # type: ignore[arg-type]
            if cfg.init_weights == "bert":
                nn.init.normal_(w, std=0.02, generator=draw)  # type: ignore[arg-type]
            elif cfg.init_weights == "houlsby":
                nn.init.trunc_normal_(w, std=0.01, a=-0.02, b=0.02, generator=draw)  # type: ignore[arg-type]
            elif name == "adapter_down":
                nn.init.kaiming_uniform_(w, a=5**0.5, generator=draw)  # type: ignore[arg-type]
            else:
                nn.init.zeros_(w)  # type: ignore[arg-type]

    def change(self, z: Tensor) -> Tensor:
        return self.adapter_up(self.adapter_down(z.to(self.adapter_up.weight.dtype)))
