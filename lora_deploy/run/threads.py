"""How many threads a session gets: those that this process may really run at once.

onnxruntime counts the cores of the machine. Where the process is bound to some of them, or a container has a quota of
processor time, its threads would wait for one another, spinning.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

__all__ = ["cpu_quota", "usable_threads"]

_ROOT = Path("/")


def usable_threads(root: Path = _ROOT) -> int:
    """Threads for one operator.

    Args:
        root: Where `proc` and `sys` are.

    Returns:
        As many as there are cores that the process may use, and whole processors in its quota, but one at least; 0,
        which leaves the choice to onnxruntime, where it may use the whole machine or nothing says.
    """
    if not hasattr(os, "sched_getaffinity"):
        return 0
    allowed = os.sched_getaffinity(0)
    cores = len({_siblings(root, cpu) for cpu in allowed})
    quota = cpu_quota(root)
    limit = cores if quota is None else min(cores, max(1, int(quota)))
    return 0 if limit == cores and len(allowed) == os.cpu_count() else limit


def cpu_quota(root: Path = _ROOT) -> float | None:
    """Processors' worth of time that the cgroups of this process, or any above them, allow; None for no limit.

    Args:
        root: Where `proc` and `sys` are.
    """
    quotas = [quota for directory in _cgroups(root) if (quota := _quota(directory)) is not None]
    return min(quotas, default=None)


def _siblings(root: Path, cpu: int) -> str:
    """What the hardware threads of one core have in common."""
    found = _read(root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
    return found or f"cpu{cpu}"


def _cgroups(root: Path) -> Iterator[Path]:
    """The directories of the process' cgroups that may say something of processors, each with those above it."""
    own = {}
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        own.update(dict.fromkeys(controllers.split(","), path))
    for line in _read(root / "proc/self/mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        inside, mounted = before.split(" ")[3:5]
        kind, _, options = after.split(" ", 2)
        # The second version has one tree, whose name is empty; the first has one for each controller.
        name = "" if kind == "cgroup2" else "cpu"
        if name not in own or not (kind == "cgroup2" or (kind == "cgroup" and "cpu" in options.split(","))):
            continue
        top = root / mounted.lstrip("/")
        # In a container a part of the tree is mounted, which may be named from the top, or from here.
        path = own[name].removeprefix(inside.rstrip("/")).strip("/")
        directory = top / path if (top / path).is_dir() and ".." not in path.split("/") else top
        yield directory
        while directory != top:
            directory = directory.parent
            yield directory


def _quota(directory: Path) -> float | None:
    """Of one cgroup: time in each period; none is "max" in the second version, and -1 in the first."""
    words = _read(directory / "cpu.max").split()
    if not words:
        words = [_read(directory / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")]
    if len(words) != 2 or not all(word.isascii() and word.isdigit() and int(word) for word in words):
        return None
    return int(words[0]) / int(words[1])


def _read(file: Path) -> str:
    """A file of the kernel's; nothing where it is not there."""
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return ""
