"""Rounding a weight to MatMulNBits' grid so that the layer's output, not the weight, stays what it was.

GPTQ (Frantar et al., 2022, arXiv:2210.17323): columns are rounded one after the other, and what each loses is made up
for by those that are still to come, as the inputs of the calibration text ask. With the idea of GPTAQ (Li et al., 2025,
arXiv:2504.02692): the layer is asked for the output that it has on its full-precision input, while it reads the input
that the quantized layers before it give. Here the weight that does that best is found first, by least squares.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from lora_deploy.quantization.affine import AffineWeight

__all__ = ["Gram", "fit_scales", "round_plain", "round_with_feedback"]

_DAMPING = 0.02  # of the mean of the diagonal
_ROWS = 4096  # of a weight that are rounded at once
_PIECE = 64  # columns between two updates of all that are to come
# Factors on the scale at which the largest weight of a block is just representable; smaller ones clip it.
_SHRINK = {4: (1.06, 1.0, 0.94, 0.88, 0.82, 0.76, 0.7), 8: (1.0, 0.95)}


@dataclass(eq=False)
class Gram:
    """What the calibration text says of a layer's input.

    Attributes:
        quantized: X.T @ X of the input that the layer gets, float32 (in, in).
        cross: X.T @ X' of the full-precision input and the one that the layer gets, (in, in); None where they are one.
    """

    quantized: torch.Tensor
    cross: torch.Tensor | None = None
    _factors: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    _target: torch.Tensor | None = None
    _root: torch.Tensor | None = None

    @property
    def importance(self) -> torch.Tensor:
        """Mean square of each input, float32 (in,)."""
        return self.quantized.diagonal()

    def _damped(self) -> torch.Tensor:
        damping = float(self.quantized.diagonal().mean()) * _DAMPING or 1.0
        return self.quantized + damping * torch.eye(len(self.quantized))

    @property
    def root(self) -> torch.Tensor:
        """Lower Cholesky factor of the damped Gram matrix, (in, in)."""
        if self._root is None:
            self._root = torch.linalg.cholesky(self._damped())
        return self._root

    def target(self, values: torch.Tensor) -> torch.Tensor:
        """The weight (out, in) that gives, on the input that the layer gets, what `values` give on the full one."""
        if self.cross is None:
            return values
        if self._target is None:
            damped = self._damped()
            cross = self.cross + (damped - self.quantized)
            self._target = torch.cholesky_solve(cross.t(), self.root).t()
        return values @ self._target

    def factor(self, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Order of the columns, and the upper Cholesky factor of the damped inverse in that order.

        Args:
            columns: Of the weight, padding included.
        """
        if columns not in self._factors:
            damped = self._damped()
            extra = columns - len(damped)
            if extra:  # columns of padding: nothing depends on them
                damped = F.pad(damped, (0, extra, 0, extra))
                damped.diagonal()[-extra:] = float(damped.diagonal()[:-extra].mean())
            order = damped.diagonal().argsort(descending=True, stable=True)
            # With H = R R.T and R upper, H^-1 = R^-T R^-1. R is the lower factor of H turned round, back to front.
            lower = torch.linalg.cholesky(damped[order][:, order].flip(0, 1))
            upper = torch.linalg.solve_triangular(lower, torch.eye(columns), upper=False).flip(0, 1)
            self._factors[columns] = order, upper.contiguous()
        return self._factors[columns]


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
    padded = F.pad(values, (0, extra))
    scales = fit_scales(padded, F.pad(gram.importance, (0, extra)), bits, blocksize, scale_dtype)
    order, factor = gram.factor(padded.shape[1])
    half = 2 ** (bits - 1)
    # Columns become rows, for torch goes through memory row by row.
    left = padded.t()[order].contiguous()
    scale = scales.t().repeat_interleave(blocksize, dim=0)[order].contiguous()
    codes = torch.empty(left.shape, dtype=torch.uint8)
    for start in range(0, len(left), _PIECE):
        end = min(start + _PIECE, len(left))
        errors = torch.empty(end - start, left.shape[1])
        for row in range(start, end):
            value, before = left[row], row - start
            if before:
                value = torch.addmv(value, errors[:before].t(), factor[start:row, row], alpha=-1)
            code = (value / scale[row]).round_().clamp_(-half, half - 1)
            codes[row] = code + half
            errors[before] = value.sub_(code.mul_(scale[row])).div_(factor[row, row])
        if end < len(left):
            left[end:].addmm_(factor[start:end, end:].t(), errors, alpha=-1)
    return AffineWeight(codes[order.argsort()].t().contiguous(), scales, columns, blocksize, bits)
