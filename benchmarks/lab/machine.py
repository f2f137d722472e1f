"""What this machine is, and how much of it others use meanwhile."""

from __future__ import annotations

from pathlib import Path

import psutil


def fast_dtype() -> str:
    """The type this CPU is fast with: bfloat16 only where it has instructions for that."""
    words = Path("/proc/cpuinfo").read_text().split()
    return "bfloat16" if {"avx512_bf16", "amx_bf16"} & set(words) else "float32"


def cpu_name() -> str:
    """What this CPU calls itself."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))


class OthersMeter:
    """How much CPU time everybody but this process and its descendants takes, from now on.

    A descendant that ends counts as one only once its parent has waited for it.
    """

    def __init__(self) -> None:
        self._before = _cpu_seconds()

    def share(self) -> float:
        """The share of all cores' time since the start, time stolen by the host included."""
        total, busy, own = (
            now - before for now, before in zip(_cpu_seconds(), self._before, strict=True)
        )
        return max(0.0, busy - own) / total


def _cpu_seconds() -> tuple[float, float, float]:
    times = psutil.cpu_times()
    # Linux counts guests' time in user and nice as well.
    total = sum(times) - times.guest - times.guest_nice
    this = psutil.Process()
    own = 0.0
    for process in (this, *this.children(recursive=True)):
        used = process.cpu_times()
        own += used.user + used.system + used.children_user + used.children_system
    return total, total - times.idle - times.iowait, own
