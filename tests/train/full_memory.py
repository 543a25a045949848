"""A machine whose memory is full at chosen moments."""

from __future__ import annotations

from trimtab.engine.memory import OverLimit, Watch


class Full(Watch):
    """Memory is full when attention layers look for these times, counted from 1."""

    def __init__(self, *times: int) -> None:
        super().__init__(limit=1)
        self.times, self.looks = times, 0

    def look(self) -> None:
        self.looks += 1
        if self.looks in self.times:
            raise OverLimit(f"full at look {self.looks}")
