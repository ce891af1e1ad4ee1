"""Norms and gated MLPs of a model that keep no more for the backward than they must.

They are known by what they are made of and what they do, whatever model they are in. What they compute stays the same
bit for bit, their gradients too.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from lora_deploy.layers.recompute import remake

__all__ = ["make_lean"]


def make_lean(model: nn.Module) -> None:
    """Let the norms and the gated MLPs of a model compute again in the backward what they would have kept, in place."""
    for module in model.modules():
        if "forward" in vars(module):  # somebody wraps it already
            continue
        if _is_norm(module):
            module.forward = partial(_norm, module)
        elif _is_gated(module):
            module.forward = partial(_gated, module)


def _is_norm(module: nn.Module) -> bool:
    """Whether a module has a weight for each channel and nothing else but a bias: it costs next to nothing."""
    own = dict(module.named_parameters())
    alone = not any(module.children()) and not any(True for _ in module.buffers())
    return alone and "weight" in own and own.keys() <= {"weight", "bias"} and all(one.ndim == 1 for one in own.values())


def _norm(module: nn.Module, *inputs: Any, **options: Any) -> Any:
    own = type(module).forward
    trained = any(parameter.requires_grad for parameter in module.parameters())
    if trained or options or not all(isinstance(one, torch.Tensor) for one in inputs):
        return own(module, *inputs, **options)
    return remake(partial(own, module), *inputs)


_PARTS = ("gate_proj", "up_proj", "down_proj", "act_fn")


class _Term:
    """A value of which only its making is known."""

    def __init__(self, made: tuple[Any, ...]) -> None:
        self.made = made

    def __mul__(self, other: _Term) -> _Term:
        return _Term(("times", self.made, other.made))


class _StandIn:
    """The parts of a gated MLP, which write down that they were called."""

    def __getattr__(self, name: str) -> Any:
        if name not in _PARTS:
            raise AttributeError(name)
        return lambda term: _Term((name, term.made))


def _is_gated(module: nn.Module) -> bool:
    """Whether a module computes down_proj(act_fn(gate_proj(x)) * up_proj(x)): its forward is run on symbols."""
    parts = dict(module.named_children())
    if parts.keys() != set(_PARTS) or any(True for _ in parts["act_fn"].parameters()):
        return False
    x = ("x",)
    product = ("times", ("act_fn", ("gate_proj", x)), ("up_proj", x))
    try:
        found = type(module).forward(_StandIn(), _Term(x))
    except (AttributeError, TypeError):  # it needs more than that
        return False
    return isinstance(found, _Term) and found.made == ("down_proj", product)


def _gated(module: Any, x: torch.Tensor) -> torch.Tensor:
    product = remake(partial(_times_activated, module.act_fn), module.gate_proj(x), module.up_proj(x))
    result: torch.Tensor = module.down_proj(product)
    return result


def _times_activated(activation: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = activation(gate) * up
    return result
