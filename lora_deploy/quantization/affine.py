"""Codes on an even grid, W = (code - zero) * scale, as onnxruntime's MatMulNBits reads them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from lora_deploy.codes import CODES
from lora_deploy.native.weights import kernels_for
from lora_deploy.quantization.weight import Blockwise4BitWeight, Int8Weight, QuantizedWeight

__all__ = ["AffineWeight", "affine_blocksize", "round_to_nearest", "to_affine8"]

# The steps from 0 to a block's absmax that leave the smallest mean square error when the 16 values of a 4-bit code are
# rounded to whole steps: found by trying every hundredth up to 127 (tests/quantization/test_affine.py does it again).
_STEPS = {"nf4": 112.03, "fp4": 120.0}
_SMALLEST_BLOCK, _LARGEST_BLOCK = 16, 128  # MatMulNBits takes no smaller one; larger ones save next to nothing


@dataclass(frozen=True, eq=False)
class AffineWeight:
    """A weight of W[n, k] = (codes[n, k] - 2**(bits - 1)) * scales[n, k // blocksize].

    Attributes:
        codes: uint8 (out, blocks * blocksize); columns past the weight's own hold the code of zero.
        scales: float32 (out, blocks).
        columns: The weight's own.
        blocksize: Weights that share a scale.
        bits: 4 or 8.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    columns: int
    blocksize: int
    bits: int = 8

    def dequantize(self) -> torch.Tensor:
        """float32 (out, in)."""
        rows, blocks = self.scales.shape
        kernels = kernels_for(self.codes, self.scales)
        if kernels is not None:
            return kernels.dequantize(self.codes, self.scales, self.columns, self.blocksize, self.bits)
        values: torch.Tensor = (self.codes.float() - 2 ** (self.bits - 1)).view(rows, blocks, self.blocksize)
        values *= self.scales[:, :, None]
        return values.view(rows, -1)[:, : self.columns].contiguous()

    def packed(self) -> torch.Tensor:
        """The codes as MatMulNBits stores them: uint8 (out, blocks, blocksize * bits / 8), the LOW nibble first."""
        rows, blocks = self.scales.shape
        if self.bits == 8:
            return self.codes.reshape(rows, blocks, -1)
        kernels = kernels_for(self.codes)
        if kernels is not None:
            return kernels.pack(self.codes).view(rows, blocks, -1)
        return (self.codes[:, ::2] | (self.codes[:, 1::2] << 4)).reshape(rows, blocks, -1)

    @classmethod
    def from_packed(
        cls, codes: torch.Tensor, scales: torch.Tensor, shape: tuple[int, int], blocksize: int, bits: int
    ) -> AffineWeight:
        """The weight from what `packed` gives.

        Args:
            codes: uint8, of any shape.
            scales: Of any shape and type.
            shape: (out, in).
            blocksize: Weights that share a scale.
            bits: 4 or 8.
        """
        rows, columns = shape
        codes = codes.reshape(rows, -1)
        if bits == 4:
            codes = torch.stack([codes & 15, codes >> 4], dim=-1).view(rows, -1)
        return cls(codes, scales.reshape(rows, -1).float(), columns, blocksize, bits)


def affine_blocksize(scheme: str, columns: int, blocksize: int) -> int:
    """The block size that `to_affine8` chooses.

    Args:
        scheme: Of the weight: "nf4", "fp4", "int8" or "none".
        columns: Of the weight.
        blocksize: Of the 4-bit weight; not looked at for others.
    """
    if scheme == "int8":  # the scale is the row's: any block will do, and one that fits needs no padding
        return max(min(_power_of_two_in(columns), _LARGEST_BLOCK), _SMALLEST_BLOCK)
    if scheme in _STEPS and _lines_up(columns, blocksize):
        return min(math.gcd(columns, blocksize), _LARGEST_BLOCK)
    return 32


def to_affine8(weight: QuantizedWeight) -> AffineWeight:
    """A quantized weight as 8-bit codes.

    LLM.int8 is on an even grid already: exact. The 16 values of nf4 and fp4 are rounded to whole steps of their block's
    scale (nf4: 0.49% of the weight's norm); where the blocks cross rows in a way that MatMulNBits has no block for, and
    for a dense weight, the values are rounded to the nearest code of blocks of 32 (0.54%).

    Args:
        weight: (out, in).
    """
    rows, columns = weight.shape
    if isinstance(weight, Int8Weight):
        blocksize = affine_blocksize("int8", columns, 0)
        codes = F.pad((weight.codes.to(torch.int16) + 128).to(torch.uint8), (0, -columns % blocksize), value=128)
        scales = (weight.row_absmax.float() / 127)[:, None].expand(rows, codes.shape[1] // blocksize)
        return AffineWeight(codes, scales.contiguous(), columns, blocksize)
    if isinstance(weight, Blockwise4BitWeight) and _lines_up(columns, weight.blocksize):
        steps = _STEPS[weight.scheme]
        code = torch.tensor(CODES[weight.scheme])
        grid = ((code * steps).round() + 128).to(torch.uint8)
        nibbles = torch.stack([weight.codes >> 4, weight.codes & 15], dim=1).view(-1)[: rows * columns]
        blocksize = affine_blocksize(weight.scheme, columns, weight.blocksize)
        starts = torch.arange(0, rows * columns, blocksize)
        scales = weight.absmax[starts // weight.blocksize] / steps
        return AffineWeight(grid[nibbles.int()].view(rows, columns), scales.view(rows, -1), columns, blocksize)
    return round_to_nearest(weight.dequantize(), 8, 32)


def round_to_nearest(values: torch.Tensor, bits: int, blocksize: int) -> AffineWeight:
    """Symmetric rounding to the nearest code, each block scaled by its largest value.

    Args:
        values: float32 (out, in).
        bits: 4 or 8.
        blocksize: Of the result.
    """
    rows, columns = values.shape
    blocks = F.pad(values, (0, -columns % blocksize)).view(rows, -1, blocksize)
    zero = 2 ** (bits - 1)
    scales = blocks.abs().amax(dim=2) / (zero - 1)
    codes = (blocks / scales.clamp(min=1e-38)[:, :, None]).round().clamp_(1 - zero, zero - 1) + zero
    return AffineWeight(codes.to(torch.uint8).view(rows, -1), scales, columns, blocksize, bits)


def _lines_up(columns: int, blocksize: int) -> bool:
    """Whether blocks that start at a row's beginning can be cut from blocks over the flat weight."""
    return _power_of_two_in(math.gcd(columns, blocksize)) == math.gcd(columns, blocksize) >= _SMALLEST_BLOCK


def _power_of_two_in(number: int) -> int:
    return number & -number
