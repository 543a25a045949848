"""An adapter's config says how large its tensors are. What it says is held against the file before it is allocated."""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from trimtab.errors import BadCheckpoint

FACTOR = 16  # what a method builds beside what it saves (projections, masks, indices) is smaller than this
FLOOR = 2**26  # values


class _Allocations(TorchDispatchMode):
    """Refuses tensors made from numbers alone (`zeros`, `empty`, `randn`, ...) that have more values than `limit`."""

    def __init__(self, limit: int, where: str) -> None:
        super().__init__()
        self.limit, self.where = limit, where

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        size = args[0] if args else None
        if isinstance(size, (list, tuple)) and all(isinstance(n, int) for n in size):
            self.check(size)
        elif isinstance(size, int) and func.namespace == "aten" and func.__name__.startswith(("eye", "arange", "randperm")):
            self.check([n for n in args[:2] if isinstance(n, int)] if func.__name__.startswith("eye") else [size])
        return func(*args, **(kwargs or {}))

    def check(self, size: Any) -> None:
        if math.prod(size) > self.limit:
            raise BadCheckpoint(
                f"{self.where}: its config asks for a tensor of shape {list(size)}, far more than its file holds or this "
                "model's layers have"
            )


@contextmanager
def bounded(model: nn.Module, tensors: Mapping[str, Tensor], where: str) -> Generator[None, None, None]:
    """Within it, no tensor is made that is much larger than any of the file's and any of the model's."""
    largest = max((t.numel() for t in (*tensors.values(), *model.parameters())), default=0)
    with _Allocations(max(FLOOR, FACTOR * largest), where):
        yield
