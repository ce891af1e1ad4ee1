"""One weight of a linear layer, dense or quantized, always seen as (out, in).

A Conv1D stores its weight as (in, out); it is turned to (out, in) before it gets here, so nothing
that holds a `QuantizedWeight` needs to know of `fan_in_fan_out`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import torch

from lora_deploy.codes import pair_table
from lora_deploy.native.weights import kernels_for

__all__ = ["Blockwise4BitWeight", "DenseWeight", "Int8Weight", "QuantizedWeight"]

# Bytes of codes looked up in one go: the indices take four times their memory.
_PIECE = 1 << 20


class QuantizedWeight(Protocol):
    """What export and verification need of a weight, however it is stored.

    A protocol, not a base class: the implementations share no code, only this shape.
    """

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""

    @property
    def scheme(self) -> str:
        """ "none", "nf4", "fp4" or "int8"."""

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The values, (out, in), computed in float32 and rounded once to `dtype`. A tensor of the caller's own."""

    def stored(self) -> Iterator[torch.Tensor]:
        """The tensors that define the weight, for hashing."""


@dataclass(frozen=True, eq=False)
class DenseWeight:
    """A weight that is not quantized.

    Attributes:
        values: (out, in), of any floating type.
    """

    values: torch.Tensor
    scheme: str = "none"

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return (self.values.shape[0], self.values.shape[1])

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """A copy of the values in `dtype`, (out, in)."""
        return self.values.to(dtype, copy=True, memory_format=torch.contiguous_format)

    def stored(self) -> Iterator[torch.Tensor]:
        """The values themselves."""
        yield self.values


@dataclass(frozen=True, eq=False)
class Int8Weight:
    """A weight as LLM.int8 stores it (https://arxiv.org/abs/2208.07339): W = codes * row_absmax / 127.

    Attributes:
        codes: int8 (out, in); bitsandbytes' CB.
        row_absmax: float32 (out,); bitsandbytes' SCB.
    """

    codes: torch.Tensor
    row_absmax: torch.Tensor
    scheme: str = "int8"

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return (self.codes.shape[0], self.codes.shape[1])

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """codes * (row_absmax / 127), (out, in)."""
        scales = self.row_absmax.float() / 127
        kernels = kernels_for(self.codes, scales)
        if kernels is not None:
            return kernels.dequantize_rows(self.codes, scales).to(dtype)
        return self.codes.to(torch.float32).mul_(scales[:, None]).to(dtype)

    def stored(self) -> Iterator[torch.Tensor]:
        """Codes, then scales."""
        yield self.codes
        yield self.row_absmax


@dataclass(frozen=True, eq=False)
class Blockwise4BitWeight:
    """A weight as bitsandbytes stores it in 4 bits: W.flat[i] = code[nibble i] * absmax[i // blocksize].

    Blocks run over the flat (out, in) array and may cross rows. A nested absmax (double quantization) is expanded
    when the weight is read, which is exact in float32.

    Attributes:
        codes: uint8, flat, ceil(out * in / 2); the HIGH nibble is the even element.
        absmax: float32, flat, ceil(out * in / blocksize).
        shape: (out, in).
        scheme: "nf4" or "fp4".
        blocksize: Weights a block.
    """

    codes: torch.Tensor
    absmax: torch.Tensor
    shape: tuple[int, int]
    scheme: str
    blocksize: int = 64

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The product of code and absmax, (out, in)."""
        rows, columns = self.shape
        count = rows * columns
        table = _pair_table(self.scheme, self.codes.device)
        kernels = kernels_for(self.codes, self.absmax)
        if kernels is not None:
            flat = kernels.dequantize_4bit(self.codes, self.absmax, table, count, self.blocksize)
            return flat.view(rows, columns).to(dtype)
        pairs = torch.empty(self.codes.numel(), 2, device=self.codes.device)
        for start in range(0, self.codes.numel(), _PIECE):
            codes = self.codes[start : start + _PIECE].to(torch.int32)
            torch.index_select(table, 0, codes, out=pairs[start : start + _PIECE])
        values = pairs.reshape(-1)
        whole = count - count % self.blocksize
        values[:whole].view(-1, self.blocksize).mul_(self.absmax[: whole // self.blocksize, None])
        if whole < count:
            values[whole:].mul_(self.absmax[-1])
        return values[:count].view(rows, columns).to(dtype)

    def stored(self) -> Iterator[torch.Tensor]:
        """Codes, then absmax."""
        yield self.codes
        yield self.absmax


@lru_cache(maxsize=8)
def _pair_table(scheme: str, device: torch.device) -> torch.Tensor:
    """(256, 2): the two values that a byte of codes stands for. Looking up bytes halves the gathers."""
    return torch.tensor(pair_table(scheme), dtype=torch.float32, device=device)
