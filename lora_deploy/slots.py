"""The places of a graph where an adapter's branch stands, and what the graph says of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, model_validator

from lora_deploy.bounds import Name, Row, Size

__all__ = ["Entry", "Slot", "SlotPart"]

_Rank = TypeVar("_Rank", int, str)


class Entry(BaseModel):
    """Something that a graph says of itself: nothing more than what is known, and not to be changed."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class SlotPart(Entry):
    """Consecutive outputs of a slot that are rows of one linear layer.

    Attributes:
        module: The layer, by its name in the transformers model.
        rows: (start, stop) of its rows, or all of them one by one where they are not in order.
    """

    module: Name
    rows: tuple[Row, ...]
    in_order: bool = True

    @model_validator(mode="after")
    def _a_range_is_two(self) -> SlotPart:
        if self.in_order and (len(self.rows) != 2 or self.rows[0] > self.rows[1]):
            raise ValueError(f"{self.module}: rows in order are (start, stop), not {self.rows[:4]}")
        return self

    def indices(self) -> range | tuple[int, ...]:
        """The rows, in order."""
        return range(self.rows[0], self.rows[1]) if self.in_order else self.rows


class Slot(Entry):
    """A place of the graph where an adapter's branch stands beside the base: x @ A @ B is added to its product.

    Attributes:
        name: Of the site.
        inputs: Width of x; A is (inputs, rank).
        outputs: Width of the product; B is (rank, outputs), scaling included.
        parts: Which layer each output belongs to, in order.
        int8_blocks: Where A and B are stored as int8 codes: how many of them share a float32 scale, in A, along the
            inputs, and in B, along the outputs. None where they are stored as floats that the graph computes with.
    """

    name: Name
    inputs: Size
    outputs: Size
    parts: tuple[SlotPart, ...]
    int8_blocks: tuple[Size, Size] | None = None

    @model_validator(mode="after")
    def _parts_and_blocks_fit(self) -> Slot:
        parts = sum(len(part.indices()) for part in self.parts)
        if parts != self.outputs:
            raise ValueError(f"{self.name}: its parts are {parts:,} outputs, not {self.outputs:,}")
        for size, block in zip((self.inputs, self.outputs), self.int8_blocks or (1, 1), strict=True):
            if size % block:
                raise ValueError(f"{self.name}: blocks of {block} do not divide {size}")
        return self

    @property
    def matrix_names(self) -> tuple[str, str]:
        """The names of A and B. No dots: clients take an input with ".key" or ".value" in its name for a cache."""
        path = self.name.replace(".", "/")
        return f"{path}/lora_A", f"{path}/lora_B"

    @property
    def input_names(self) -> tuple[str, ...]:
        """The names of the tensors that hold A and B: their own, or those of codes and scales of A and then of B."""
        if self.int8_blocks is None:
            return self.matrix_names
        return tuple(f"{name}_{part}" for name in self.matrix_names for part in ("codes", "scales"))

    def input_shapes(self, rank: _Rank) -> tuple[tuple[int | _Rank, ...], ...]:
        """The shapes of these tensors in a graph whose slots take any adapter.

        Args:
            rank: A number or a name.
        """
        if self.int8_blocks is None:
            return (self.inputs, rank), (rank, self.outputs)
        block_a, block_b = self.int8_blocks
        blocks_a, blocks_b = self.inputs // block_a, self.outputs // block_b
        return (blocks_a, block_a, rank), (blocks_a, 1, rank), (rank, blocks_b, block_b), (rank, blocks_b, 1)

    @property
    def modules(self) -> tuple[str, ...]:
        """The layers, each once, in order."""
        return tuple(dict.fromkeys(part.module for part in self.parts))

    def places(self, module: str) -> Iterator[tuple[slice, list[int]]]:
        """Where a layer's outputs are: columns of B, and the rows of the layer that they are."""
        column = 0
        for part in self.parts:
            start, column = column, column + len(part.indices())
            if part.module == module:
                yield slice(start, column), list(part.indices())
