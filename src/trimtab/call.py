"""What a call of the model brings beside the input of each layer: task ids, the positions that act, the rows of a mixed batch.

It is set where the model's forward begins and stays when it ends, so that layers which the backward computes again read it
again. Outside of both nothing is read: a layer that is called by itself has no such call.
"""

# pyright: reportPrivateUsage=false
# (torch.utils.checkpoint asks the same function whether a backward runs)
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from trimtab.errors import NotSupported, TrainingError


class Call:
    """One for each model. `values`: by adapter, of its own rows; under "" the rows of a mixed batch."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.inside: nn.Module | None = None  # the module whose forward opened the call, while it runs
        self.number = self.answers = 0  # which values these are; and those of the forward whose backward runs
        self.size = 0  # rows of the batch
        self.tokens = False  # rows of tokens came in: inside the model they have a position axis
        self.before: tuple[dict[str, Any], int] = ({}, 0)
        self.scope: dict[str, Any] = {}  # what `generate` was called with
        self.asked: dict[str, Any] = {}  # the arguments that are ours: adapter_names, task_ids
        self.cache: Any = None  # what the call goes on from
        self.kept: dict[str, Any] = {}  # what goes with the cache into later calls

    def get(self, name: str) -> Any:
        if self.inside is not None:
            return self.values.get(name)
        if not self.number or torch._C._current_graph_task_id() == -1:
            return None
        if self.answers != self.number:
            raise TrainingError(
                "checkpointed layers are computed again for a forward after which another one ran with other rows, tokens or "
                "tasks: call backward before the next forward, or turn gradient checkpointing off"
            )
        return self.values.get(name)

    def begins(self, number: int, gradient: Tensor) -> None:
        """A hook on the outputs of forward `number`: its backward runs now."""
        self.answers = number

    def check(self, x: Tensor, size: int, path: str) -> None:
        """Raise unless the rows of `x` are those of the call. In a list of layers, tokens without a position axis are no
        rows, even if there happen to be as many."""
        flat = self.tokens and x.dim() < 3 and any(part.isdigit() for part in path.split("."))
        if x.shape[0] != size or flat:
            raise NotSupported(
                f"{path!r} gets {tuple(x.shape)}, whose first axis is not the {size} rows of the batch, so what is asked for "
                "row by row cannot be done there: call the model once for each adapter or task"
            )
