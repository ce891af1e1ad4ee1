"""How the process asks the system for memory."""

from __future__ import annotations

import ctypes
import os
import platform

__all__ = ["keep_freed_memory"]

# mallopt's numbers in glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8
_NEVER = (1 << 31) - 1


def keep_freed_memory() -> None:
    """Let what is freed stay in the process and be given out again; for a command that works on tensor after tensor.

    glibc gives a large tensor pages of its own, which the system must clear for each tensor anew, and which cost as
    much as the work on them. Nothing is done on other systems, nor where the environment sets glibc's own `MALLOC_...`.
    """
    if platform.libc_ver()[0] != "glibc" or any(name.startswith("MALLOC_") for name in os.environ):
        return
    mallopt = ctypes.CDLL(None).mallopt
    for option, value in ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, _NEVER)):
        mallopt(option, value)
