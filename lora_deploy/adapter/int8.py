"""A and B of a slot as int8 codes, each block of them with a scale: value = code * scale.

Blocks run along the layer's width, never along the rank, so the vectors of different ranks, and with them those of
different layers, share no scale. What is zero in B because it belongs to another layer is the code 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

__all__ = ["choose_blocks", "dequantize", "join_blocks", "quantize_a", "quantize_b"]

_LARGEST_CODE = 127
_BLOCKS = (32, 16)  # what is tried first


def choose_blocks(inputs: int, widths: Iterable[int]) -> tuple[int, int]:
    """The block sizes of a slot: 32 or 16 values where that divides the width, else all of it.

    Args:
        inputs: Width of what the slot reads.
        widths: Outputs of each of its parts, in order. No block crosses from one part into the next, unless there is
            one block for all of them.

    Returns:
        That of A, along the inputs, and that of B, along the outputs.
    """
    widths = list(widths)
    return _block_in(inputs, inputs), _block_in(math.gcd(*widths), sum(widths))


def _block_in(length: int, whole: int) -> int:
    return next((block for block in _BLOCKS if length % block == 0), whole)


def quantize_a(a: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A (inputs, rank) as int8 codes (blocks, block, rank) and float32 scales (blocks, 1, rank)."""
    return _quantize(a.float().reshape(a.shape[0] // block, block, a.shape[1]), dim=1)


def quantize_b(b: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """B (rank, outputs), scaling included, as int8 codes (rank, blocks, block) and float32 scales (rank, blocks, 1)."""
    return _quantize(b.float().reshape(b.shape[0], b.shape[1] // block, block), dim=2)


def _quantize(values: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric rounding to -127..127, each block scaled by its largest value; a block of zeros has the scale 0."""
    if not values.numel():
        return values.to(torch.int8), values.sum(dim, keepdim=True)
    scales = values.abs().amax(dim, keepdim=True) / _LARGEST_CODE
    codes = torch.where(scales > 0, values / scales, 0).round_().clamp_(-_LARGEST_CODE, _LARGEST_CODE)
    return codes.nan_to_num_().to(torch.int8), scales


def dequantize(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The float32 values of three-dimensional codes, in the same shape, by the graph's own arithmetic."""
    return codes.float() * scales


def join_blocks(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A (blocks, block, rank) as (inputs, rank), and B (rank, blocks, block) as (rank, outputs)."""
    return a.flatten(0, 1), b.flatten(1, 2)
