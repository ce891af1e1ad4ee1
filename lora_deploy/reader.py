"""Tensors of safetensors files, one at a time, in little memory.

`safetensors` maps a whole file, and the kernel counts the pages that were read as resident until the last tensor of
that mapping is gone: so a large tensor gets a mapping of its own. It also parses the whole header whenever it opens a
file: so small tensors, of which there may be ten thousand, share one for some megabytes.
"""

from __future__ import annotations

import os
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

__all__ = ["TensorReader"]

_LARGE, _SHARED = 1 << 18, 1 << 22  # values


class TensorReader:
    """Reads tensors of files, the last of which stays open; threads may share it."""

    def __init__(self) -> None:
        self._open = ExitStack()
        self._opened: Any = None
        self._state: tuple[object, ...] = ()
        self._values = 0
        self._lock = threading.Lock()

    def read(self, file: Path, name: str, values: int, rows: range | None = None) -> torch.Tensor:
        """One tensor, or some of its rows, whose memory is a mapping of the file.

        Args:
            file: The safetensors file. Where it is not what it was, it is opened anew.
            name: Of the tensor.
            values: How many it has.
            rows: Those that are wanted, of a tensor with rows; None for all of it.

        Raises:
            SafetensorError, OSError: It cannot be read.
        """
        if values > _LARGE:
            with safe_open(file, framework="pt") as opened:
                if rows is not None:
                    return opened.get_slice(name)[rows.start : rows.stop]  # type: ignore[no-any-return]
                return opened.get_tensor(name)  # type: ignore[no-any-return]
        with self._lock:
            tensor = self._read_small(file, name, values)
        return tensor if rows is None else tensor[rows.start : rows.stop]

    def _read_small(self, file: Path, name: str, values: int) -> torch.Tensor:
        status = os.stat(file)
        state = (file, status.st_ino, status.st_size, status.st_mtime_ns)
        if self._opened is None or state != self._state or self._values > _SHARED:
            self._open.close()
            self._opened, self._state = self._open.enter_context(safe_open(file, framework="pt")), state
            self._values = 0
        self._values += values
        return self._opened.get_tensor(name)  # type: ignore[no-any-return]
