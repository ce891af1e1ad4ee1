"""What an adapter changes in a table of tokens: a low-rank update of all of its rows, or new rows in place of some.

The change becomes a whole table only where one is asked for, one table in memory at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lora_deploy.errors import AdapterError

__all__ = ["EmbeddingUpdate", "TableUpdate", "TokenRows", "check_copy"]


@dataclass(frozen=True, eq=False)
class EmbeddingUpdate:
    """The low-rank update of an embedding.

    Attributes:
        A: (r, vocabulary).
        B: (dim, r).
        scaling: The factor on (B @ A).T.
        magnitude: DoRA's length of each column of the changed table, (dim,); None for plain LoRA.
    """

    A: torch.Tensor
    B: torch.Tensor
    scaling: float
    magnitude: torch.Tensor | None = None

    def fits(self, shape: tuple[int, ...] | None) -> bool:
        """Whether a table of this shape can be changed so."""
        return shape == (self.A.shape[1], self.B.shape[0])

    def describe(self) -> str:
        """What it changes, for messages."""
        return f"an update of a table {(self.A.shape[1], self.B.shape[0])}"

    def change_table(self, table: torch.Tensor) -> torch.Tensor:
        """The changed table.

        Args:
            table: float32 (vocabulary, dim); is overwritten.
        """
        table.addmm_(self.A.float().t(), (self.B.float() * self.scaling).t())
        if self.magnitude is not None:
            # Lengths of columns, where a linear layer has those of rows: PEFT sees the table as (dim, vocabulary).
            table.mul_(self.magnitude.float() / torch.linalg.vector_norm(table, dim=0))
        return table

    def tensors(self) -> dict[str, torch.Tensor]:
        """What is trained, by PEFT's endings of the names."""
        named = {"lora_embedding_A": self.A, "lora_embedding_B": self.B, "lora_magnitude_vector": self.magnitude}
        return {name: values for name, values in named.items() if values is not None}


@dataclass(frozen=True, eq=False)
class TokenRows:
    """Rows of a table that were trained alone: they take the place of the base's.

    Attributes:
        indices: Of the tokens, each once.
        rows: (tokens, dim).
    """

    indices: tuple[int, ...]
    rows: torch.Tensor

    def fits(self, shape: tuple[int, ...] | None) -> bool:
        """Whether a table of this shape can be changed so."""
        if shape is None or len(shape) != 2:
            return False
        return self.rows.shape == (len(self.indices), shape[1]) and all(0 <= index < shape[0] for index in self.indices)

    def describe(self) -> str:
        """What it changes, for messages."""
        return f"{len(self.indices)} rows {tuple(self.rows.shape[1:])}, of tokens up to {max(self.indices)}"

    def change_table(self, table: torch.Tensor) -> torch.Tensor:
        """The changed table.

        Args:
            table: float32 (vocabulary, dim); is overwritten.
        """
        return table.index_copy_(0, torch.tensor(self.indices), self.rows.float())

    def tensors(self) -> dict[str, torch.Tensor]:
        """What is trained, by PEFT's endings of the names."""
        return {"token_adapter.trainable_tokens_delta": self.rows}


TableUpdate = EmbeddingUpdate | TokenRows


def check_copy(own: torch.Tensor, saved: torch.Tensor, name: str, source: str) -> None:
    """PEFT saves the base's table beside its update. It must be the base's, or the adapter was trained on another.

    Args:
        own: The base's table.
        saved: The adapter's copy of it, in the type that training had it in.
        name: Of the table.
        source: Of the adapter.

    Raises:
        AdapterError: They differ.
    """
    if own.shape != saved.shape or not torch.equal(own.detach().cpu().to(saved.dtype), saved):
        raise AdapterError(
            "the adapter was trained on another table of tokens than the base's",
            file=source,
            tensor=name,
            found=f"a copy of the table it was trained on, {tuple(saved.shape)}, {saved.dtype}",
            expected=f"the base's own, {tuple(own.shape)}",
            remedy="give the base that the adapter was trained on, saved with its tokens",
        )
