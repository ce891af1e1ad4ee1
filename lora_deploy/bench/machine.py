"""The machine and the memory that a number is of."""

from __future__ import annotations

import os
import platform
from pathlib import Path

__all__ = ["describe_machine", "peak_memory", "resident_memory"]


def describe_machine() -> dict[str, str | int]:
    """The processor's name, its cores, those that this process may use, bytes of memory, and the system."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count() or 1,
        "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "memory_bytes": _memory(),
        "system": platform.platform(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def _memory() -> int:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 0


def resident_memory() -> int | None:
    """Bytes of this process in memory now, mapped files included; None where the system does not say (not Linux)."""
    return _status("VmRSS")


def peak_memory() -> int | None:
    """The most that `resident_memory` has been: the kernel's VmHWM."""
    return _status("VmHWM")


def _status(field: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    found = next((line.split()[1] for line in lines if line.startswith(f"{field}:")), None)
    return None if found is None else int(found) * 1024
