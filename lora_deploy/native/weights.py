"""Rounding weights to codes and reading codes back, in C: bit for bit what torch gives, in a fraction of the time.

Optional: where there is no C compiler, the callers do the same in torch.
"""

from __future__ import annotations

import ctypes
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import torch

from lora_deploy.errors import UsageError
from lora_deploy.native.build import load_weights

__all__ = ["LARGEST_BLOCK", "WeightKernels", "kernels_for", "weight_kernels"]

LARGEST_BLOCK, _LARGEST_BNB = 256, 4096  # of weights that are rounded, and of bitsandbytes'; weights.c says the same
_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_READ = (torch.float32, torch.uint8, torch.int8)
_SHARE = 1 << 20  # weights below which a thread does not pay
_ONCE = threading.Lock()
_FUNCTIONS = ("fit", "quantize", "pack", "dequantize", "dequantize_rows", "dequantize_4bit", "quantize_4bit")


class WeightKernels:
    """The functions of weights.c on tensors: on the CPU, contiguous, of the types and sizes that are said.

    They share a large weight among as many threads as torch uses, and hold no lock meanwhile.

    Args:
        library: The compiled library.

    Raises:
        OSError: It cannot be loaded.
    """

    def __init__(self, library: str) -> None:
        loaded = ctypes.CDLL(library)
        self._functions = {name: getattr(loaded, f"lora_deploy_{name}") for name in _FUNCTIONS}
        for name, function in self._functions.items():
            function.restype = ctypes.c_int64 if name == "fit" else None

    def fit(
        self, values: torch.Tensor, importance: torch.Tensor, bits: int, blocksize: int, scale_dtype: torch.dtype
    ) -> tuple[torch.Tensor, int]:
        """The scale of each block with the smallest weighted square error, of a few that clip more or less.

        Args:
            values: float32 (out, in).
            importance: float32 (in,), the weight of each column's error.
            bits: 4 or 8.
            blocksize: Weights that share a scale, at most LARGEST_BLOCK; the last block of a row may be partly empty.
            scale_dtype: float32, float16 or bfloat16; scales are rounded to it.

        Returns:
            float32 (out, blocks), and for how many blocks no scale has a finite error.
        """
        rows, columns = values.shape
        scales = torch.empty(rows, -(-columns // blocksize))
        pointers = (
            _pointer(values, torch.float32, rows * columns),
            _pointer(importance, torch.float32, columns),
            _pointer(scales, torch.float32, scales.numel()),
        )
        rest = (ctypes.c_int64(columns), _block(blocksize), _bits(bits), _TYPES[scale_dtype])
        return scales, self._share("fit", rows, values.numel(), pointers, rest)

    def quantize(
        self, values: torch.Tensor, scales: torch.Tensor, bits: int, blocksize: int, *, packed: bool
    ) -> torch.Tensor:
        """The nearest code of each value; the code of zero is 2**(bits - 1).

        Args:
            values: float32 (out, in).
            scales: float32 (out, blocks), as `fit` gives them.
            bits: 4 or 8.
            blocksize: As in `fit`; what is empty of a last block gets the code of zero.
            packed: Whether codes of 4 bits share a byte, the LOW nibble first.

        Returns:
            uint8 (out, blocks * blocksize), or half as many columns.
        """
        rows, columns = values.shape
        halved = packed and bits == 4
        blocks = -(-columns // blocksize)
        codes = torch.empty(rows, blocks * blocksize // (2 if halved else 1), dtype=torch.uint8)
        pointers = (
            _pointer(values, torch.float32, rows * columns),
            _pointer(scales, torch.float32, rows * blocks),
            _pointer(codes, torch.uint8, codes.numel()),
        )
        rest = (ctypes.c_int64(columns), _block(blocksize), _bits(bits), int(halved))
        self._share("quantize", rows, values.numel(), pointers, rest)
        return codes

    def pack(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes of 4 bits, two to a byte, the LOW nibble first.

        Args:
            codes: uint8 (rows, columns), of an even number of columns.

        Returns:
            uint8 (rows, columns / 2).
        """
        packed = torch.empty(codes.shape[0], codes.shape[1] // 2, dtype=torch.uint8)
        pointers = (
            _pointer(codes, torch.uint8, 2 * packed.numel()),
            _pointer(packed, torch.uint8, packed.numel()),
        )
        self._share("pack", packed.numel(), packed.numel(), pointers, ())
        return packed

    def dequantize(
        self, codes: torch.Tensor, scales: torch.Tensor, columns: int, blocksize: int, bits: int
    ) -> torch.Tensor:
        """(codes - 2**(bits - 1)) * scale of the block.

        Args:
            codes: uint8 (out, blocks * blocksize), one a byte.
            scales: float32 (out, blocks).
            columns: The weight's own.
            blocksize: Weights that share a scale.
            bits: 4 or 8.

        Returns:
            float32 (out, columns).
        """
        rows, blocks = len(scales), -(-columns // blocksize)
        values = torch.empty(rows, columns)
        pointers = (
            _pointer(codes, torch.uint8, rows * blocks * blocksize),
            _pointer(scales, torch.float32, rows * blocks),
            _pointer(values, torch.float32, values.numel()),
        )
        rest = (ctypes.c_int64(columns), ctypes.c_int(blocksize), _bits(bits))
        self._share("dequantize", rows, values.numel(), pointers, rest)
        return values

    def dequantize_rows(self, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """codes * scale of the row.

        Args:
            codes: int8 (out, in).
            scales: float32 (out,).

        Returns:
            float32 (out, in).
        """
        rows, columns = codes.shape
        values = torch.empty(rows, columns)
        pointers = (
            _pointer(codes, torch.int8, rows * columns),
            _pointer(scales, torch.float32, rows),
            _pointer(values, torch.float32, values.numel()),
        )
        self._share("dequantize_rows", rows, values.numel(), pointers, (ctypes.c_int64(columns),))
        return values

    def dequantize_4bit(
        self, codes: torch.Tensor, absmax: torch.Tensor, pairs: torch.Tensor, count: int, blocksize: int
    ) -> torch.Tensor:
        """value of the nibble * absmax of the block, the HIGH nibble first; blocks run over the flat weight.

        Args:
            codes: uint8, ceil(count / 2).
            absmax: float32, ceil(count / blocksize).
            pairs: float32 (256, 2), the two values that a byte stands for.
            count: Of the weights.
            blocksize: Weights a block.

        Returns:
            float32 (count,).
        """
        values = torch.empty(count)
        blocks = -(-count // blocksize)
        pointers = (
            _pointer(codes, torch.uint8, -(-count // 2)),
            _pointer(absmax, torch.float32, blocks),
            _pointer(pairs, torch.float32, 512),
            _pointer(values, torch.float32, count),
        )
        rest = (ctypes.c_int64(count), ctypes.c_int64(blocksize))
        self._share("dequantize_4bit", blocks, count, pointers, rest)
        return values

    def quantize_4bit(
        self, values: torch.Tensor, bounds: torch.Tensor, order: torch.Tensor, blocksize: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes of 4 bits and the absmax of each block, as bitsandbytes' kernel for CPUs gives them.

        Args:
            values: float32 or bfloat16, flat.
            bounds: float32 (15,), the midpoints between the sorted values of the code.
            order: uint8 (16,), the nibble of each of the sorted values.
            blocksize: Weights a block, even and at most 4096; blocks run over the flat weight.

        Returns:
            uint8 (ceil(n / 2),), the HIGH nibble first, and float32 (ceil(n / blocksize),).
        """
        if not 0 < blocksize <= _LARGEST_BNB or blocksize % 2:
            raise ValueError(f"blocks of {blocksize}")
        count = values.numel()
        blocks = -(-count // blocksize)
        codes, absmax = torch.empty(-(-count // 2), dtype=torch.uint8), torch.empty(blocks)
        kind = torch.bfloat16 if values.dtype == torch.bfloat16 else torch.float32
        pointers = (
            _pointer(values, kind, count),
            _pointer(bounds, torch.float32, 15),
            _pointer(order, torch.uint8, 16),
            _pointer(codes, torch.uint8, codes.numel()),
            _pointer(absmax, torch.float32, blocks),
        )
        rest = (ctypes.c_int64(count), ctypes.c_int(blocksize), _TYPES[kind])
        self._share("quantize_4bit", blocks, count, pointers, rest)
        return codes, absmax

    def _share(self, name: str, rows: int, size: int, before: tuple[object, ...], after: tuple[object, ...]) -> int:
        """Call a function on all rows, in as many threads as pay; the sum of what they return."""
        function = self._functions[name]

        def call(begin: int, end: int) -> int:
            return function(*before, ctypes.c_int64(begin), ctypes.c_int64(end), *after) or 0

        threads = min(torch.get_num_threads(), size // _SHARE, rows)
        if threads <= 1:
            return call(0, rows)
        bounds = [rows * index // threads for index in range(threads + 1)]
        with ThreadPoolExecutor(threads) as pool:
            return sum(pool.map(call, bounds[:-1], bounds[1:]))


def weight_kernels() -> WeightKernels | None:
    """The kernels, compiled if this machine has not done it yet (some seconds); None where that is not possible."""
    with _ONCE:  # the first threads of an export come at the same time
        return _load_kernels()


@lru_cache(maxsize=1)
def _load_kernels() -> WeightKernels | None:
    try:
        return WeightKernels(str(load_weights()))
    except (UsageError, OSError, RuntimeError):  # the others: no home, or one whose files may not be executed
        return None


def kernels_for(*tensors: torch.Tensor) -> WeightKernels | None:
    """The kernels, if there are any and they can read these tensors: contiguous, on the CPU, float32 or codes."""
    if not all(one.dtype in _READ and one.device.type == "cpu" and one.is_contiguous() for one in tensors):
        return None
    return weight_kernels()


def _pointer(tensor: torch.Tensor, dtype: torch.dtype, count: int) -> ctypes.c_void_p:
    """Where a tensor begins. What C does not check is checked here.

    Raises:
        ValueError: The tensor is of another type or size, or not contiguous on the CPU.
    """
    if tensor.dtype != dtype or tensor.numel() != count or tensor.device.type != "cpu" or not tensor.is_contiguous():
        raise ValueError(f"{tuple(tensor.shape)} of {tensor.dtype} on {tensor.device}, not {count} of {dtype} in a row")
    return ctypes.c_void_p(tensor.data_ptr())


def _block(blocksize: int) -> ctypes.c_int:
    if not 0 < blocksize <= LARGEST_BLOCK or blocksize % 2:
        raise ValueError(f"blocks of {blocksize}")
    return ctypes.c_int(blocksize)


def _bits(bits: int) -> ctypes.c_int:
    if bits not in (4, 8):
        raise ValueError(f"{bits} bits")
    return ctypes.c_int(bits)
