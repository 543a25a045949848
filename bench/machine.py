"""What a figure was measured on: the machine, the versions, the code, and how busy others kept the cores."""

from __future__ import annotations

import hashlib
import os
import platform
import time
from pathlib import Path
from typing import Any

import trimtab
from trimtab.train import device, record

PACKAGES = ("trimtab", "torch", "transformers", "peft", "trl", "bitsandbytes", "accelerate")
MATRIX_UNITS = {"amx_bf16": "AMX", "avx512_bf16": "AVX-512 bf16"}


def versions() -> dict[str, str]:
    return record.versions(PACKAGES)


def dtype() -> str:
    """In which a CPU or card multiplies best, of the two that are benched."""
    return str(device.pick("auto").dtype).removeprefix("torch.")


def machine() -> dict[str, Any]:
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    fields = dict(line.split(":", 1) for line in text.split("\n\n")[0].split("\n") if ":" in line)
    about = {name.strip(): value.strip() for name, value in fields.items()}
    units = [unit for flag, unit in MATRIX_UNITS.items() if flag in about.get("flags", "").split()]
    return {
        "cpu": about.get("model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count() or 1,
        "bf16": " and ".join(units) or "none that is known",
        "memory_bytes": _memory(),
        "system": platform.platform(terse=True),
    }


def _memory() -> int | None:
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def code() -> str:
    """A hash of the package's sources: figures of different code are never put in one table."""
    root = Path(trimtab.__file__).parent
    digest = hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        digest.update(str(file.relative_to(root)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:12]


class Others:
    """With `Others() as others:` around a run, `others.cores` is how many cores everybody else used meanwhile: the busy
    time of all cores, less that of our processes which ended, over the time that passed. None where it cannot be read."""

    cores: float | None = None

    def __enter__(self) -> Others:
        self._before = _seconds()
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None and (after := _seconds()) is not None:
            busy, own, passed = (now - then for now, then in zip(after, self._before, strict=True))
            self.cores = round(max(busy - own, 0.0) / max(passed, 1e-9), 2)


def _seconds() -> tuple[float, float, float] | None:
    """Busy seconds of all cores, those of this process and its ended children, and the clock."""
    if not Path("/proc/stat").exists():
        return None
    ticks = Path("/proc/stat").read_text().split("\n")[0].split()[1:]
    user, nice, system, _, _, irq, softirq, steal, *_ = map(int, ticks)
    busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    own = os.times()
    return busy, own.user + own.system + own.children_user + own.children_system, time.monotonic()
