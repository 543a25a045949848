"""How much memory a step may take, and how to notice that it took more before the machine does."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

SHARE = 0.9  # of what is there
_PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096
_STATM = Path("/proc/self/statm")
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h
_CGROUP = Path("/sys/fs/cgroup")


class OverLimit(RuntimeError):
    """This process has passed its memory limit."""


# how devices say it that have no exception of their own for it
_SAID = ("DefaultCPUAllocator: can't allocate memory", "DefaultCPUAllocator: not enough memory", "out of memory")


def out_of_memory(error: BaseException) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError | OverLimit):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _SAID)


def release() -> None:
    """Give what nothing refers to any more back to the system."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if sys.platform == "linux":  # the C library keeps freed memory for itself, and it would still count as held
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)


class Watch:
    """Raises `OverLimit` when this process holds more than `limit` bytes. Where the system does not say, it sees nothing."""

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit if limit is not None else _limit()

    def look(self) -> None:
        if self.limit and (held := resident()) > self.limit:
            raise OverLimit(f"this process holds {held / 2**30:.1f} GB, the limit is {self.limit / 2**30:.1f} GB")


def resident() -> int:
    """Bytes of memory that this process holds; 0 where the system does not say."""
    try:
        return int(_STATM.read_bytes().split()[1]) * _PAGE
    except OSError:
        return 0


def _limit() -> int:
    """What this process may hold: the machine's free memory and its own, or what its control group grants."""
    found = [n for n in (_free() + resident(), _granted()) if n]
    return int(SHARE * min(found)) if found and _free() else 0


def _free() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 0
    values = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
    return values.get("MemAvailable", 0)


def _granted() -> int:
    try:
        text = (_CGROUP / "memory.max").read_text().strip()
    except OSError:
        return 0
    return int(text) if text.isdigit() else 0


def keep_freed() -> None:
    """Let this process keep freed memory for its next tensors, where the C library is glibc.

    By default the large tensors of each step are handed back to the system and come anew, page by page: on a CPU that costs
    a training step 5 to 10 %. The process then never shrinks before it ends, so this is for programs that train, not for a
    library to do when it is imported.
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return  # another C library
    mallopt(_M_MMAP_THRESHOLD, 32 << 20)  # the largest that it takes
    mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def token_bytes(config: Any, itemsize: int) -> int:
    """About what one token leaves behind for the backward: inputs of each product, norms, gates, without checkpointing."""
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    width = int(getattr(config, "hidden_size", 1024))
    inner = int(getattr(config, "intermediate_size", 0) or 4 * width)
    return int(getattr(config, "num_hidden_layers", 24)) * (10 * width + 4 * inner) * itemsize
