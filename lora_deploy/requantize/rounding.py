"""Rounding a weight to MatMulNBits' grid so that the layer's output, not the weight, stays what it was.

GPTQ (Frantar et al., 2022, arXiv:2210.17323): columns are rounded one after the other, and what each loses is made up
for by those that are still to come, as the inputs of the calibration text ask. With the idea of GPTAQ (Li et al., 2025,
arXiv:2504.02692): the layer is asked for the output that it has on its full-precision input, while it reads the input
that the quantized layers before it give. Here the weight that does that best is found first, by least squares.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from lora_deploy.errors import InputError
from lora_deploy.native.weights import LARGEST_BLOCK, WeightKernels, kernels_for
from lora_deploy.quantization.affine import AffineWeight
from lora_deploy.requantize.gram import Gram

__all__ = ["fit_scales", "pack_plain", "round_plain", "round_with_feedback"]

_ROWS = 1024  # of a weight whose scales are fitted at once
_PIECE = 64  # columns between two updates of all that are to come
# Factors on the scale at which the largest weight of a block is just representable; smaller ones clip it. weights.c has
# the same.
_SHRINK = {4: (1.06, 1.0, 0.94, 0.88, 0.82, 0.76, 0.7), 8: (1.0, 0.95)}


def fit_scales(
    values: torch.Tensor,
    importance: torch.Tensor,
    bits: int,
    blocksize: int,
    scale_dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """The scale of each block with the smallest weighted square error, of a few that clip more or less.

    A scale may be negative: the codes reach one step further on one side, which is turned to the largest weight.

    Args:
        values: float32 (out, in). A last block that is partly empty counts as filled up with zeros.
        importance: float32 (in,), the weight of each column's error.
        bits: 4 or 8.
        blocksize: Weights that share a scale.
        scale_dtype: Type that the scales will be stored in; they are rounded to it.

    Returns:
        float32 (out, blocks).

    Raises:
        InputError: No scale of the type is large enough.
    """
    kernels = _kernels_for(blocksize, values, importance)
    if kernels is not None:
        scales, failed = kernels.fit(values, importance, bits, blocksize, scale_dtype)
    else:
        scales, failed = _fit_in_torch(values, importance, bits, blocksize, scale_dtype)
    if failed:  # every scale overflows; what is left would be zeros
        raise InputError(
            "a merged weight is too large for the scales of its codes",
            found=f"{float(values.abs().max()):g}",
            expected=f"at most {torch.finfo(scale_dtype).max * (2 ** (bits - 1) - 1):g}, with scales in {scale_dtype}",
            remedy="export with --compute-dtype fp32, or with --precision fp32",
        )
    return scales


def _kernels_for(blocksize: int, *tensors: torch.Tensor) -> WeightKernels | None:
    return kernels_for(*tensors) if blocksize <= LARGEST_BLOCK else None


def _fit_in_torch(
    values: torch.Tensor, importance: torch.Tensor, bits: int, blocksize: int, scale_dtype: torch.dtype
) -> tuple[torch.Tensor, int]:
    """What `WeightKernels.fit` gives, bit for bit."""
    extra = -values.shape[1] % blocksize
    blocks = F.pad(values, (0, extra)).view(len(values), -1, blocksize)
    weight = F.pad(importance, (0, extra)).view(1, -1, blocksize)
    half = 2 ** (bits - 1)
    largest = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
    best, error = torch.zeros_like(largest), torch.full_like(largest, torch.inf)
    whole = -largest / half
    for scale in (*(whole * factor for factor in _SHRINK[bits]), largest.abs() / (half - 1)):
        scale = torch.where(scale == 0, 1.0, scale).to(scale_dtype).float()
        codes = (blocks / scale).round_().clamp_(-half, half - 1)
        found = _add_halves(codes.mul_(scale).sub_(blocks).square_().mul_(weight))
        better = found < error
        best, error = torch.where(better, scale, best), torch.where(better, found, error)
    return best[..., 0], int((~torch.isfinite(error)).sum())


def _add_halves(values: torch.Tensor) -> torch.Tensor:
    """The sum over the last axis, which stays, in an order that every machine and weights.c can keep to; in place."""
    while (count := values.shape[-1]) > 1:
        kept = (count + 1) // 2
        values[..., : count - kept] += values[..., kept:]
        values = values[..., :kept]
    return values


def round_plain(
    values: torch.Tensor, bits: int, blocksize: int, scale_dtype: torch.dtype = torch.float32
) -> AffineWeight:
    """Each weight rounded by itself, with fitted scales: for layers that no calibration text reaches.

    Args:
        values: (out, in).
        bits: 4 or 8.
        blocksize: Weights that share a scale.
        scale_dtype: Type that the scales will be stored in.

    Raises:
        InputError: No scale of the type is large enough.
    """
    codes, scales = _round_each(values, bits, blocksize, scale_dtype, packed=False)
    return AffineWeight(codes, scales, values.shape[1], blocksize, bits)


def pack_plain(
    values: torch.Tensor, bits: int, blocksize: int, scale_dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `round_plain` gives, packed, in less memory: arguments and exceptions are its own.

    Returns:
        The codes as `AffineWeight.packed` gives them, uint8 (out, blocks, blocksize * bits / 8), and the scales,
        float32 (out, blocks).
    """
    codes, scales = _round_each(values, bits, blocksize, scale_dtype, packed=True)
    return codes.view(*scales.shape, -1), scales


def _round_each(
    values: torch.Tensor, bits: int, blocksize: int, scale_dtype: torch.dtype, *, packed: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (out, ...) and scales."""
    codes, scales = [], []
    importance = torch.ones(values.shape[1])
    for piece in torch.split(values, _ROWS):  # an output head is large
        piece = piece.float().contiguous()
        scales.append(fit_scales(piece, importance, bits, blocksize, scale_dtype))
        kernels = _kernels_for(blocksize, piece)
        if kernels is not None:
            codes.append(kernels.quantize(piece, scales[-1], bits, blocksize, packed=packed))
        else:
            codes.append(_quantize_in_torch(piece, scales[-1], bits, blocksize, packed=packed))
    return torch.cat(codes), torch.cat(scales)


def _quantize_in_torch(
    values: torch.Tensor, scales: torch.Tensor, bits: int, blocksize: int, *, packed: bool
) -> torch.Tensor:
    """What `WeightKernels.quantize` gives."""
    half, columns = 2 ** (bits - 1), values.shape[1]
    wide = scales.repeat_interleave(blocksize, dim=1)
    padded = F.pad(values, (0, -columns % blocksize))
    codes = (padded / wide).round_().clamp_(-half, half - 1).add_(half).to(torch.uint8)
    return AffineWeight(codes, scales, columns, blocksize, bits).packed().view(len(codes), -1) if packed else codes


def round_with_feedback(
    values: torch.Tensor, gram: Gram, bits: int, blocksize: int, scale_dtype: torch.dtype = torch.float32
) -> AffineWeight:
    """Round to the grid so that the output changes least on the calibration text.

    Args:
        values: The weight that is wanted on the input that the layer gets (`Gram.target`), float32 (out, in).
        gram: Of that input.
        bits: 4 or 8.
        blocksize: Weights that share a scale.
        scale_dtype: Type that the scales will be stored in.
    """
    columns = values.shape[1]
    extra = -columns % blocksize
    pieces = (piece.contiguous() for piece in torch.split(values, _ROWS))
    scales = torch.cat([fit_scales(piece, gram.importance, bits, blocksize, scale_dtype) for piece in pieces])
    order, factor = gram.order, gram.inverse_root
    half = 2 ** (bits - 1)
    # Columns become rows, for torch goes through memory row by row.
    left = values.t()[order].contiguous()
    scale = scales.t().repeat_interleave(blocksize, dim=0)[order].contiguous()
    codes = torch.full((columns + extra, len(values)), half, dtype=torch.uint8)  # those of the padding are zeros
    for start in range(0, columns, _PIECE):
        end = min(start + _PIECE, columns)
        errors = torch.empty(end - start, left.shape[1])
        for row in range(start, end):
            value, before = left[row], row - start
            if before:
                value = torch.addmv(value, errors[:before].t(), factor[start:row, row], alpha=-1)
            code = (value / scale[row]).round_().clamp_(-half, half - 1)
            codes[order[row]] = code + half
            errors[before] = value.sub_(code.mul_(scale[row])).div_(factor[row, row])
        if end < columns:
            left[end:].addmm_(factor[start:end, end:].t(), errors, alpha=-1)
    return AffineWeight(codes.t().contiguous(), scales, columns, blocksize, bits)
