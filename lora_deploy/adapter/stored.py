"""The updates of an adapter's file, each read when it is asked for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch

from lora_deploy.adapter.adapter import LoraUpdate
from lora_deploy.adapter.tables import EmbeddingUpdate, TableUpdate, TokenRows
from lora_deploy.config import LoraConfig
from lora_deploy.reader import TensorReader

__all__ = ["TOKENS", "Part", "Stored", "make_table", "make_update", "tokens_of"]

TOKENS = "token_adapter.trainable_tokens_delta"

_Change = TypeVar("_Change")
Parts = Mapping[str, torch.Tensor]


class Part(NamedTuple):
    """A, B, or what else a layer's update has: its key in the file, and its shape."""

    key: str
    shape: tuple[int, ...]


class Stored(Mapping[str, _Change]):
    """The updates of a file, each read when it is asked for."""

    def __init__(
        self,
        file: Path,
        parts: dict[str, dict[str, Part]],
        config: LoraConfig,
        make: Callable[[str, Parts, LoraConfig], _Change],
    ) -> None:
        self._file, self._parts, self._config, self._make = file, parts, config, make
        self._reader = TensorReader()

    def __getitem__(self, target: str) -> _Change:
        read = {
            name: self._reader.read(self._file, part.key, math.prod(part.shape))
            for name, part in self._parts[target].items()
        }
        return self._make(target, read, self._config)

    def __contains__(self, target: object) -> bool:
        return target in self._parts

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)


def make_update(target: str, read: Parts, config: LoraConfig) -> LoraUpdate:
    """The update of a linear layer, of its tensors by PEFT's endings of their names."""
    return LoraUpdate(
        read["lora_A.weight"],
        read["lora_B.weight"],
        config.scaling(target),
        read.get("lora_magnitude_vector"),
        read.get("lora_B.bias"),
    )


def make_table(target: str, read: Parts, config: LoraConfig) -> TableUpdate:
    """What changes in a table of tokens, of its tensors by PEFT's endings of their names."""
    if TOKENS in read:
        return TokenRows(tokens_of(target, config), read[TOKENS])
    magnitude = read.get("lora_magnitude_vector")
    return EmbeddingUpdate(read["lora_embedding_A"], read["lora_embedding_B"], config.scaling(target), magnitude)


def tokens_of(target: str, config: LoraConfig) -> tuple[int, ...]:
    """The tokens whose rows are trained in one table; none where the configuration does not name it."""
    asked = config.trainable_token_indices
    if not isinstance(asked, dict):
        return tuple(asked or ())
    return next((tuple(found) for name, found in asked.items() if f".{target}".endswith(f".{name}")), ())
