"""What a choice costs: the adapter's file, the memory of its training, and what it adds where it is deployed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import torch
from pydantic import BaseModel

from lora_deploy.planning.base import PlannedBase
from lora_deploy.planning.choices import Choice
from lora_deploy.planning.trace import trace_step

__all__ = ["BranchCost", "TrainingMemory", "adapter_bytes", "branch_cost", "estimate_memory"]

_KEY = "base_model.model.{}.lora_{}.weight"
_ADAMW = 8  # bytes of state for a parameter: two float32 moments
_ADAMW_8BIT = 2


class TrainingMemory(BaseModel):
    """An estimate of the memory that training takes beyond the libraries, in bytes.

    base + trainable * (weight + gradient + optimizer state) + activations + workspace.

    Attributes:
        base: Codes, scales and everything that is not quantized, exactly.
        adapter: A float32 weight and gradient, and AdamW's two moments (one byte each in 8 bits), for each parameter.
        activations: Most that a step of one batch has alive at once, counted on fake tensors.
        workspace: The largest quantized weight, dequantized.
    """

    base: int
    adapter: int
    activations: int
    workspace: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.base + self.adapter + self.activations + self.workspace


class BranchCost(BaseModel):
    """What an adapter adds to an export where it stays a branch; merged, it adds nothing.

    Layers that read the same input are one product with one branch, whose B has the outputs of all of them: it is zero
    for what is not adapted, and is multiplied with all the same.

    Attributes:
        bytes: Of A and B in float32.
        multiply_adds: For a token.
    """

    bytes: int
    multiply_adds: int


def adapter_bytes(shapes: Mapping[str, tuple[int, int]], rank: int) -> int:
    """Size of `adapter_model.safetensors`, exactly: its header, and A and B in float32.

    Args:
        shapes: (out, in) of each adapted layer, by name.
        rank: Of every update.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (rows, columns) in shapes.items():
        for side, shape in (("A", [rank, columns]), ("B", [rows, rank])):
            start, end = end, end + 4 * shape[0] * shape[1]
            header[_KEY.format(name, side)] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    text = len(json.dumps(header, separators=(",", ":")))
    return 8 + -(-text // 8) * 8 + end  # the length, the header filled up to a multiple of 8, the values


def branch_cost(choice: Choice, sites: Sequence[Sequence[str]], base: Mapping[str, tuple[int, int]]) -> BranchCost:
    """What a choice costs as a branch.

    Args:
        choice: The choice.
        sites: The linear layers that read the same input.
        base: (out, in) of every linear layer.
    """
    adapted = choice.shapes
    products = 0
    for site in sites:
        rank = choice.rank * sum(name in adapted for name in site)
        if rank:
            products += rank * (base[site[0]][1] + sum(base[name][0] for name in site))
    return BranchCost(bytes=4 * products, multiply_adds=products)


def estimate_memory(
    base: PlannedBase, choice: Choice, *, batch: int, length: int, on_gpu: bool = False
) -> TrainingMemory:
    """The memory of training a choice.

    Args:
        base: What it is trained on.
        choice: The choice.
        batch: Rows in a step.
        length: Tokens of the longest row.
        on_gpu: The base computes in bfloat16, and AdamW's state has 8 bits.
    """
    dtype = torch.bfloat16 if on_gpu else torch.float32
    trace = trace_step(base.config, choice.targets, choice.rank, batch=batch, length=length, compute_dtype=dtype)
    state = _ADAMW_8BIT if on_gpu else _ADAMW
    return TrainingMemory(
        base=base.training_bytes(dtype),
        adapter=choice.parameters * (4 + 4 + state),
        activations=trace.activations,
        workspace=base.largest_quantized() * dtype.itemsize,
    )
