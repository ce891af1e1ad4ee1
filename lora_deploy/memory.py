"""How the process asks the system for memory."""

from __future__ import annotations

import os

__all__ = ["use_huge_pages"]


def use_huge_pages() -> None:
    """Let torch ask Linux for pages of 2 MB under large tensors; for a command that works on tensor after tensor.

    Every new tensor's pages must be made and cleared, which at 4 KB each costs as much as the work on them. torch looks
    at this when it first allocates; it does nothing where the system gives no such pages. What the user has set holds.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
