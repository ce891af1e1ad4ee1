"""Cheap tensors that the backward computes again, bit for bit, in the place of keeping them.

`remake(make, *inputs)` is `make(*inputs)` whose graph keeps the inputs alone. A layer that reads the result can keep
them too (`origin_of`): what it has in common with other layers, such as the input of a norm, is kept once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch.autograd.function import once_differentiable

__all__ = ["Origin", "Recipe", "origin_of", "remake", "saves_for_backward"]

Make = Callable[..., torch.Tensor]


class Recipe:
    """How a tensor was computed, and in a backward the tensor again, with the graph from its inputs.

    Args:
        make: Deterministic; reads nothing that changes but its inputs.
        device: Of the inputs.
    """

    def __init__(self, make: Make, device: torch.device) -> None:
        self.make = make
        self._autocast = partial(
            torch.autocast,
            device.type,
            dtype=torch.get_autocast_dtype(device.type),
            enabled=torch.is_autocast_enabled(device.type),
        )
        self._made: tuple[list[torch.Tensor], torch.Tensor] | None = None

    def again(self, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        """The tensor, without a graph; computed once for all that ask for it in a backward.

        Args:
            inputs: What it was made of.
        """
        return self._make(inputs)[1].detach()

    def backward(self, inputs: Sequence[torch.Tensor], grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The gradients of the inputs; None where there is none. The tensor is then forgotten."""
        leaves, result = self._make(inputs)
        self._made = None
        found = iter(torch.autograd.grad(result, [leaf for leaf in leaves if leaf.requires_grad], grad))
        return tuple(next(found) if leaf.requires_grad else None for leaf in leaves)

    def _make(self, inputs: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], torch.Tensor]:
        if self._made is None:
            leaves = [kept.detach().requires_grad_(kept.requires_grad) for kept in inputs]
            with torch.enable_grad(), self._autocast():
                self._made = leaves, self.make(*leaves)
        return self._made


class Origin(NamedTuple):
    """What a tensor was made of.

    Attributes:
        recipe: How to make it again.
        inputs: Of what.
        version: Torch's count of changes in place, when it was made.
    """

    recipe: Recipe
    inputs: tuple[torch.Tensor, ...]
    version: int


def origin_of(x: torch.Tensor) -> Origin | None:
    """What `remake` made a tensor of; None for any other tensor, and for one that was changed since."""
    origin = cast("Origin | None", getattr(x, "_origin", None))
    return origin if origin is not None and origin.version == x._version else None


def saves_for_backward(*tensors: torch.Tensor | None) -> bool:
    """Whether a graph is being made from these tensors, by torch itself and not by its compiler."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return False
    return any(tensor is not None and tensor.requires_grad and not tensor.is_meta for tensor in tensors)


def remake(make: Make, *inputs: torch.Tensor) -> torch.Tensor:
    """`make(*inputs)`, computed again in the backward from the inputs.

    Args:
        make: Deterministic; its result depends on the inputs and on what is frozen.
        *inputs: All tensors through which gradients go.

    Returns:
        The tensor; `origin_of` knows what it was made of where a graph is made.
    """
    if not saves_for_backward(*inputs):
        return make(*inputs)
    recipe = Recipe(make, inputs[0].device)
    result = cast(torch.Tensor, _Remake.apply(recipe, *inputs))  # type: ignore[no-untyped-call]
    result._origin = Origin(recipe, inputs, result._version)  # type: ignore[attr-defined]
    return result


class _Remake(torch.autograd.Function):
    """Keeps the inputs of a function; the backward runs it again, with a graph of its own."""

    @staticmethod
    def forward(ctx: Any, recipe: Recipe, *inputs: torch.Tensor) -> torch.Tensor:
        ctx.recipe = recipe
        ctx.save_for_backward(*inputs)
        return recipe.make(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return None, *ctx.recipe.backward(ctx.saved_tensors, grad)
