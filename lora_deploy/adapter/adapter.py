"""A trained adapter as plain tensors, independent of any model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from lora_deploy.config import LoraConfig
from lora_deploy.errors import AdapterError

__all__ = ["LoraAdapter", "LoraUpdate"]


@dataclass(frozen=True, eq=False)
class LoraUpdate:
    """The low-rank update of one linear layer.

    Attributes:
        A: (r, in).
        B: (out, r).
        scaling: The factor on B @ A.
    """

    A: torch.Tensor
    B: torch.Tensor
    scaling: float

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the weight that is updated."""
        return (self.B.shape[0], self.A.shape[1])

    def delta_weight(self) -> torch.Tensor:
        """scaling * B @ A in float32, (out, in)."""
        return (self.B.float() * self.scaling) @ self.A.float()


@dataclass(frozen=True, eq=False)
class LoraAdapter:
    """Everything an adapter changes in its base.

    Attributes:
        config: Its configuration.
        updates: The update of each adapted layer, by the layer's name in the transformers model.
        parameters: Parameters that were trained whole (modules_to_save, biases), by their name in the model.
        source: Where it was read from, for messages.
    """

    config: LoraConfig
    updates: Mapping[str, LoraUpdate]
    parameters: Mapping[str, torch.Tensor] = field(default_factory=dict)
    source: str = "the adapter"

    def delta_weight(self, target: str) -> torch.Tensor:
        """The change of one layer's weight, float32 (out, in)."""
        return self.updates[target].delta_weight()

    def check_against(self, shapes: Mapping[str, tuple[int, ...]], linears: Mapping[str, tuple[int, int]]) -> None:
        """Make sure that the adapter fits a base.

        Args:
            shapes: Shape of every parameter of the base, by name.
            linears: (out, in) of every linear layer that can be adapted, by name.

        Raises:
            AdapterError: A layer or parameter is not in the base, or has another shape there.
        """
        for name, update in self.updates.items():
            if name not in linears:
                raise AdapterError(
                    "the adapter changes a layer that the base does not have",
                    file=self.source,
                    tensor=name,
                    expected=f"one of the base's {len(linears)} linear layers, {next(iter(linears), 'none')} for one",
                    remedy="give the base that the adapter was trained on",
                )
            if update.shape != linears[name]:
                raise AdapterError(
                    "the adapter's update has another shape than the base's weight",
                    file=self.source,
                    tensor=name,
                    found=f"B @ A is {update.shape}",
                    expected=f"{linears[name]}",
                    remedy="give the base that the adapter was trained on",
                )
        for name, values in self.parameters.items():
            if shapes.get(name) != tuple(values.shape):
                raise AdapterError(
                    "the adapter holds a trained parameter that does not fit the base",
                    file=self.source,
                    tensor=name,
                    found=tuple(values.shape),
                    expected=shapes.get(name, "no such parameter"),
                    remedy="give the base that the adapter was trained on",
                )
