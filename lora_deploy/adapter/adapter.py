"""A trained adapter as plain tensors, independent of any model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch

from lora_deploy.adapter.tables import TableUpdate
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
        magnitude: DoRA's length of each row of the merged weight, (out,); None for plain LoRA.
        bias: That of B, (out,), before scaling; None where it has none.
    """

    A: torch.Tensor
    B: torch.Tensor
    scaling: float
    magnitude: torch.Tensor | None = None
    bias: torch.Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the weight that is updated."""
        return (self.B.shape[0], self.A.shape[1])

    def delta_weight(self) -> torch.Tensor:
        """scaling * B @ A in float32, (out, in)."""
        return (self.B.float() * self.scaling) @ self.A.float()

    def merge_into(self, base: torch.Tensor) -> torch.Tensor:
        """The merged weight: base + scaling * B @ A, and with DoRA each row brought to its magnitude.

        Args:
            base: float32 (out, in); is overwritten.

        Returns:
            float32 (out, in).
        """
        base.addmm_(self.B.float() * self.scaling, self.A.float())
        return base if self.magnitude is None else base.mul_(self._ratio(base)[:, None])

    def change(self, read_base: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The merged weight less the base's, float32 (out, in).

        Args:
            read_base: Gives the base's weight, (out, in). Only DoRA's change depends on it; for plain LoRA nothing is
                read.
        """
        if self.magnitude is None:
            return self.delta_weight()
        base = read_base().float()
        return self.merge_into(base.clone()).sub_(base)

    def row_scale(self, base: torch.Tensor) -> torch.Tensor | None:
        """DoRA's factor on each output of base and branch together, magnitude / |row of base + scaling * B @ A|.

        Args:
            base: float32 (out, in); is overwritten.

        Returns:
            float32 (out,); None for plain LoRA.
        """
        if self.magnitude is None:
            return None
        return self._ratio(base.addmm_(self.B.float() * self.scaling, self.A.float()))

    def _ratio(self, merged: torch.Tensor) -> torch.Tensor:
        assert self.magnitude is not None
        norms: torch.Tensor = torch.linalg.vector_norm(merged, dim=1)
        return self.magnitude.float() / norms

    def scaled_bias(self) -> torch.Tensor | None:
        """What B's bias adds to the output, float32 (out,); None where it has none."""
        return None if self.bias is None else self.bias.float() * self.scaling

    def tensors(self) -> dict[str, torch.Tensor]:
        """What is trained, by PEFT's endings of the names."""
        named = {"lora_A.weight": self.A, "lora_B.weight": self.B, "lora_B.bias": self.bias}
        named["lora_magnitude_vector"] = self.magnitude
        return {name: values for name, values in named.items() if values is not None}


@dataclass(frozen=True, eq=False)
class LoraAdapter:
    """Everything an adapter changes in its base.

    Attributes:
        config: Its configuration.
        updates: The update of each adapted layer, by the layer's name in the transformers model.
        parameters: Parameters that were trained whole (modules_to_save, biases), by their name in the model.
        source: Where it was read from, for messages.
        tables: What changes in embeddings and in the rows of output heads, by the layer's name.
    """

    config: LoraConfig
    updates: Mapping[str, LoraUpdate]
    parameters: Mapping[str, torch.Tensor] = field(default_factory=dict)
    source: str = "the adapter"
    tables: Mapping[str, TableUpdate] = field(default_factory=dict)

    def delta_weight(self, target: str) -> torch.Tensor:
        """scaling * B @ A of one layer, float32 (out, in): with DoRA not all of what changes in its weight."""
        return self.updates[target].delta_weight()

    def only_updates(self) -> LoraAdapter:
        """A and B alone, without what else is trained."""
        config = self.config.model_copy(update={"use_dora": False, "lora_bias": False})
        return replace(self, config=config, parameters={}, tables={})

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
        for name, table in self.tables.items():
            shape = shapes.get(f"{name}.weight")
            if not table.fits(shape):
                raise AdapterError(
                    "the adapter changes a table of tokens that the base does not have",
                    file=self.source,
                    tensor=name,
                    found=table.describe(),
                    expected="no such table" if shape is None else f"one for a table {shape}",
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
