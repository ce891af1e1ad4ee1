"""Cheap tensors that the backward computes again, bit for bit, in the place of keeping them.

`remake(make, *inputs)` is `make(*inputs)` whose graph keeps the inputs alone. A layer that reads the result can keep
them too (`origin_of`): what it has in common with other layers, such as the input of a norm, is kept once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, cast

import torch
from torch.autograd.function import once_differentiable

__all__ = ["Origin", "Recipe", "origin_of", "remake", "saves_for_backward"]

Make = Callable[..., torch.Tensor]


class Recipe:
    """How a tensor was computed, and the tensor again while somebody is still to read it in a backward.

    Args:
        make: Deterministic; reads nothing that changes but its inputs.
        device: Of the inputs.

    Attributes:
        readers: How many layers will ask for the tensor in one backward.
    """

    def __init__(self, make: Make, device: torch.device) -> None:
        self.make = make
        self.readers = 0
        self._device, self._enabled = device.type, torch.is_autocast_enabled(device.type)
        self._dtype = torch.get_autocast_dtype(device.type)
        self._value: torch.Tensor | None = None
        self._left = 0

    def as_before(self) -> AbstractContextManager[Any]:
        """The autocast that was in force."""
        return torch.autocast(self._device, dtype=self._dtype, enabled=self._enabled)

    def again(self, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        """The tensor; the last reader of a backward leaves nothing behind.

        Args:
            inputs: What it was made of.
        """
        if self._value is None:
            with torch.no_grad(), self.as_before():
                self._value = self.make(*inputs)
            self._left = self.readers
        value = self._value
        self._left -= 1
        if self._left <= 0:
            self._value = None
        return value


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
    return any(tensor is not None and tensor.requires_grad for tensor in tensors)


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
        wanted = ctx.needs_input_grad[1:]
        inputs = [kept.detach().requires_grad_(needs) for kept, needs in zip(ctx.saved_tensors, wanted, strict=True)]
        with torch.enable_grad(), ctx.recipe.as_before():
            result = ctx.recipe.make(*inputs)
        found = iter(torch.autograd.grad(result, [one for one in inputs if one.requires_grad], grad))
        return None, *(next(found) if needs else None for needs in wanted)
