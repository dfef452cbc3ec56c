"""How much of the machine a process may use."""

import math
import os
from pathlib import Path

__all__ = ["usable_cores"]


def usable_cores(system: Path = Path("/sys")) -> int:
    """Cores that this process may compute on, at least 1.

    Those that it may be scheduled on, each counted once however many threads it runs at a time, and no more than the
    quota of its control group, which containers are given. Engines count the machine's, and then wait for each other.

    Args:
        system: where the kernel says so; where it does not, the processors that Python counts.
    """
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    siblings = {
        _text(system / f"devices/system/cpu/cpu{cpu}/topology/thread_siblings_list") or f"{cpu}" for cpu in allowed
    }
    quota = _quota(system / "fs/cgroup")
    return max(1, len(siblings) if quota is None else min(len(siblings), math.ceil(quota)))


def _quota(folder: Path) -> float | None:
    """Processors' worth of time that the control group may take; None: all."""
    limit, _, period = _text(folder / "cpu.max").partition(" ")  # version 2, else 1
    if not limit:
        limit, period = (_text(folder / "cpu" / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
    if not (limit.isdecimal() and period.isdecimal() and int(period)):
        return None
    return int(limit) / int(period)


def _text(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""
