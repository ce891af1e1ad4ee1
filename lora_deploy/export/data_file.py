"""A file of weights that is hashed while it is written, and on its way to the disk before it is whole."""

from __future__ import annotations

import ctypes
import hashlib
import os
import sys
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

__all__ = ["DataFile"]

_PIECE = 1 << 24  # bytes
_BEHIND = 4  # pieces that wait for the hash
_WRITEBACK = 1 << 26  # bytes after which the system is told to begin
_SYNC_FILE_RANGE_WRITE = 2


class DataFile:
    """A new file. Bytes are written in the caller's thread and hashed in another.

    Args:
        path: Of the file.

    Raises:
        OSError: It cannot be written; from every method.
    """

    def __init__(self, path: Path) -> None:
        self._file = open(path, "wb")  # noqa: SIM115 - closed by __exit__
        self._digest = hashlib.sha256()
        self._hashing = ThreadPoolExecutor(1, "hash")
        self._waiting: deque[Future[None]] = deque()
        self._handed_over = 0

    def __enter__(self) -> DataFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._hashing.shutdown(cancel_futures=True)
        self._file.close()

    def align(self, alignment: int) -> int:
        """Fill up with zeros; returns where the next bytes go, a multiple of `alignment`."""
        self._append(memoryview(bytes(-self._file.tell() % alignment)))
        return self._file.tell()

    def write(self, values: torch.Tensor, on_bytes: Callable[[int], None]) -> int:
        """Append the bytes of a tensor.

        Args:
            values: Contiguous, of any type.
            on_bytes: Is told how many bytes were written, again and again.

        Returns:
            How many they are.
        """
        raw = values.reshape(-1).view(torch.uint8).numpy().data
        for start in range(0, len(raw), _PIECE):
            piece = raw[start : start + _PIECE]
            self._append(piece)
            on_bytes(len(piece))
        return len(raw)

    def finish(self) -> str:
        """Bring everything to the disk; returns the SHA-256 of the file."""
        self._file.flush()
        os.fsync(self._file.fileno())
        while self._waiting:
            self._waiting.popleft().result()
        return self._digest.hexdigest()

    def _append(self, piece: memoryview) -> None:
        self._waiting.append(self._hashing.submit(self._digest.update, piece))
        self._file.write(piece)
        while len(self._waiting) > _BEHIND:
            self._waiting.popleft().result()
        if self._file.tell() - self._handed_over >= _WRITEBACK:
            self._begin_writeback()

    def _begin_writeback(self) -> None:
        """Let the disk work while the next weights are made, or the last step would wait for all of them."""
        self._file.flush()
        start, self._handed_over = self._handed_over, self._file.tell()
        if (begin := _sync_file_range()) is not None:  # its failure is the sync's to report
            begin(self._file.fileno(), start, self._handed_over - start, _SYNC_FILE_RANGE_WRITE)


@lru_cache(maxsize=1)
def _sync_file_range() -> Any:
    """Linux' function of this name, which Python does not have; None on other systems."""
    if sys.platform != "linux":
        return None
    function = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if function is not None:
        function.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
    return function
