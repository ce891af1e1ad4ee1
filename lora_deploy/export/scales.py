"""The scales of codes, in the type that a graph computes in."""

from __future__ import annotations

import torch

from lora_deploy.errors import InputError
from lora_deploy.quantization.base import TrainingBase
from lora_deploy.quantization.stored_codes import all_finite

__all__ = ["cast_scales"]


def cast_scales(
    scales: torch.Tensor, dtype: torch.dtype, parameter: str, base: TrainingBase, *, merged: bool = False
) -> torch.Tensor:
    """The scales of a layer in the type of the computation, which the operators ask of them.

    Args:
        scales: float32.
        dtype: That type.
        parameter: The layer's weight, by its name in the transformers model.
        base: Holds it.
        merged: Whether they are those of the merged weight, not of the base's own.

    Raises:
        InputError: One is not finite, or too large or too small for the type.
    """
    result = scales.to(dtype)
    finite = all_finite(scales)
    if finite and all_finite(result) and not bool(((result == 0) & (scales != 0)).any()):
        return result
    whose = "merged weight's" if merged else "base's"
    if not finite:
        raise InputError(
            f"a scale of the {whose} codes is not finite",
            **base.place(parameter),
            found="NaN or infinity",
            expected="finite numbers",
            remedy="the adapter diverged: take an earlier checkpoint"
            if merged
            else "the checkpoint is damaged: get it again",
        )
    raise InputError(
        f"a scale of the {whose} codes does not fit the type that is computed in",
        **base.place(parameter),
        found=f"{float(scales.abs().min()):g} to {float(scales.abs().max()):g}",
        expected=f"{torch.finfo(dtype).tiny:g} to {torch.finfo(dtype).max:g}",
        remedy="export with --compute-dtype fp32",
    )
