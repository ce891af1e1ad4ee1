"""A low-rank branch that takes back part of what rounding lost, where the inputs of the layer are large.

LQER (Zhang et al., 2024, arXiv:2402.02446) with the whole Gram matrix of the inputs in the place of its diagonal: the
product of rank r that is nearest to the rounding's error on the calibration text.
"""

from __future__ import annotations

import torch

from lora_deploy.adapter import LoraUpdate
from lora_deploy.quantization.affine import AffineWeight
from lora_deploy.requantize.gram import Gram
from lora_deploy.requantize.rounding import round_with_feedback

__all__ = ["round_with_correction"]


def round_with_correction(
    values: torch.Tensor, gram: Gram, bits: int, blocksize: int, scale_dtype: torch.dtype, rank: int
) -> tuple[AffineWeight, LoraUpdate]:
    """Round a weight beside a branch of low rank, so that both together change the output least.

    The rounding is done twice: once to see what it loses, then again with what the branch will carry taken out, after
    which the branch is fitted to what is lost now.

    Args:
        values: The weight that is wanted on the input that the layer gets, float32 (out, in).
        gram: Of that input.
        bits: 4 or 8.
        blocksize: Weights that share a scale.
        scale_dtype: Type that the scales will be stored in.
        rank: Of the branch.

    Returns:
        The codes, and the branch, with scaling 1.
    """
    rounded = round_with_feedback(values, gram, bits, blocksize, scale_dtype)
    first = _fit(values - rounded.dequantize(), gram, rank)
    rounded = round_with_feedback(values - first.delta_weight(), gram, bits, blocksize, scale_dtype)
    return rounded, _fit(values - rounded.dequantize(), gram, rank)


def _fit(error: torch.Tensor, gram: Gram, rank: int) -> LoraUpdate:
    """B @ A of the given rank with the smallest ||(error - B @ A) X||."""
    rank = min(rank, *error.shape)
    root = gram.root
    # error X X.T error.T = (error R)(error R).T: its leading eigenvectors span the outputs that B must reach.
    scaled = error[:, gram.order] @ root
    if scaled.shape[0] <= scaled.shape[1]:
        left = torch.linalg.eigh(scaled @ scaled.t()).eigenvectors[:, -rank:].flip(1)
        b, a = left, left.t() @ error
    else:
        right = torch.linalg.eigh(scaled.t() @ scaled).eigenvectors[:, -rank:].flip(1)
        b = scaled @ right
        a = gram.in_place(torch.linalg.solve_triangular(root.t(), right, upper=False).t())
    # Both factors of one size, so that neither is lost in rounding.
    norms = (a.norm(dim=1) / b.norm(dim=0).clamp(min=1e-30)).sqrt().clamp(min=1e-30)
    return LoraUpdate((a / norms[:, None]).contiguous(), (b * norms).contiguous(), 1.0)
