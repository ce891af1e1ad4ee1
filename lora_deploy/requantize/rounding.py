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
from lora_deploy.quantization.affine import AffineWeight
from lora_deploy.requantize.gram import Gram

__all__ = ["fit_scales", "round_plain", "round_with_feedback"]

_ROWS = 1024  # of a weight whose scales are fitted at once
_PIECE = 64  # columns between two updates of all that are to come
# Factors on the scale at which the largest weight of a block is just representable; smaller ones clip it.
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
        values: float32 (out, in), a multiple of the block size in.
        importance: float32 (in,), the weight of each column's error.
        bits: 4 or 8.
        blocksize: Weights that share a scale.
        scale_dtype: Type that the scales will be stored in; they are rounded to it.

    Returns:
        float32 (out, blocks).

    Raises:
        InputError: No scale of the type is large enough.
    """
    blocks = values.view(len(values), -1, blocksize)
    weight = importance.view(1, -1, blocksize)
    half = 2 ** (bits - 1)
    largest = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
    best, error = torch.zeros_like(largest), torch.full_like(largest, torch.inf)
    whole = -largest / half
    for scale in (*(whole * factor for factor in _SHRINK[bits]), largest.abs() / (half - 1)):
        scale = torch.where(scale == 0, 1.0, scale).to(scale_dtype).float()
        codes = (blocks / scale).round_().clamp_(-half, half - 1)
        found = codes.mul_(scale).sub_(blocks).square_().mul_(weight).sum(-1, keepdim=True)
        better = found < error
        best, error = torch.where(better, scale, best), torch.where(better, found, error)
    if not bool(torch.isfinite(error).all()):  # every scale overflows; what is left would be zeros
        raise InputError(
            "a merged weight is too large for the scales of its codes",
            found=f"{float(values.abs().max()):g}",
            expected=f"at most {torch.finfo(scale_dtype).max * (half - 1):g}, with scales in {scale_dtype}",
            remedy="export with --compute-dtype fp32, or with --precision fp32",
        )
    return best[..., 0]


def round_plain(
    values: torch.Tensor, bits: int, blocksize: int, scale_dtype: torch.dtype = torch.float32
) -> AffineWeight:
    """Each weight rounded by itself, with fitted scales: for layers that no calibration text reaches.

    Args:
        values: (out, in).
        bits: 4 or 8.
        blocksize: Weights that share a scale.
        scale_dtype: Type that the scales will be stored in.
    """
    half, codes, scales = 2 ** (bits - 1), [], []
    for piece in torch.split(values, _ROWS):  # an output head is large
        padded = F.pad(piece.float(), (0, -piece.shape[1] % blocksize))
        scales.append(fit_scales(padded, torch.ones(padded.shape[1]), bits, blocksize, scale_dtype))
        wide = scales[-1].repeat_interleave(blocksize, dim=1)
        codes.append((padded / wide).round_().clamp_(-half, half - 1).add_(half).to(torch.uint8))
    return AffineWeight(torch.cat(codes), torch.cat(scales), values.shape[1], blocksize, bits)


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
    importance = F.pad(gram.importance, (0, extra))
    pieces = (F.pad(piece, (0, extra)) for piece in torch.split(values, _ROWS))
    scales = torch.cat([fit_scales(piece, importance, bits, blocksize, scale_dtype) for piece in pieces])
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
