"""Rows that are decoded together, though they begin and end at different times."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_deploy.run.generate import ROOM, pad_left
from lora_deploy.run.session import Cache, OnnxSession, numpy_of

__all__ = ["SLICE", "Batch"]

SLICE = 512  # tokens of a prompt that are run at once
_LENGTH = 2  # of a cache (batch, heads, length, head size)


class Batch:
    """The mask and the cache of some rows.

    In a graph that writes in place a token's position is its place in the cache. No row can be moved there: all begin
    together, and one that has ended stays, hidden, until the last has.

    Args:
        session: The open export.

    Attributes:
        can_grow: Whether rows can join those that are there.
    """

    def __init__(self, session: OnnxSession) -> None:
        self._session = session
        self._moves = not session.writes_in_place
        self._mask = np.zeros((0, 0), np.int64)
        self._alive = np.zeros(0, bool)
        self._cache: Cache = {}

    def __len__(self) -> int:
        return int(self._alive.sum())

    @property
    def can_grow(self) -> bool:
        """Whether rows can join now."""
        return self._moves or not len(self)

    @property
    def width(self) -> int:
        """Places of a row, padding included."""
        return int(self._mask.shape[1])

    def join(self, rows: Sequence[list[int]], adapter: Mapping[str, Any], room: int) -> NDArray[np.float32]:
        """Run the prompts of new rows, which stand behind those that are there.

        Args:
            rows: Tokens of each.
            adapter: What a run of these rows alone is given.
            room: New tokens that the cache should have place for.

        Returns:
            Logits of each new row's next token, (rows, vocabulary).
        """
        assert self.can_grow
        ids, mask = pad_left(rows, max(map(len, rows)))
        cache = self._session.empty_cache(len(rows), room=ids.shape[1] + min(room, ROOM))
        # Logits of a long prompt are gigabytes. Several rows are short, and begin with padding that sees nothing.
        step = SLICE if len(rows) == 1 else ids.shape[1]
        for start in range(0, ids.shape[1], step):
            end = start + step
            logits, cache = self._session.forward(ids[:, start:end], mask[:, :end], cache, adapter)
        if not len(self):
            self._mask, self._cache, self._alive = mask, cache, np.ones(len(rows), bool)
        else:
            width = max(self.width, mask.shape[1])
            halves = (self._cache, self.width), (cache, mask.shape[1])
            self._cache = {
                name: self._session.upload(
                    np.concatenate([_widen(numpy_of(half[name]), _LENGTH, width - own) for half, own in halves])
                )
                for name in cache
            }
            self._mask = np.concatenate(
                [_widen(self._mask, 1, width - self.width), _widen(mask, 1, width - mask.shape[1])]
            )
            self._alive = np.ones(len(self._mask), bool)
        return logits[:, -1]

    def step(self, tokens: Sequence[int], adapter: Mapping[str, Any]) -> NDArray[np.float32]:
        """Run one new token of each row.

        Args:
            tokens: Of the rows that are left, in order.
            adapter: What a run of all rows is given, those that have ended included (`spread`).

        Returns:
            Logits of each row's next token, (rows, vocabulary).
        """
        new = np.zeros((len(self._alive), 1), np.int64)
        new[self._alive, 0] = tokens
        self._mask = np.concatenate([self._mask, self._alive.astype(np.int64)[:, None]], axis=1)
        logits, self._cache = self._session.forward(new, self._mask, self._cache, adapter)
        left: NDArray[np.float32] = logits[self._alive, -1]
        return left

    def keep(self, kept: NDArray[np.bool_]) -> None:
        """Let rows go.

        Args:
            kept: For each row that is left, whether it stays.
        """
        if not kept.any():
            self._mask, self._cache, self._alive = np.zeros((0, 0), np.int64), {}, np.zeros(0, bool)
            return
        if not self._moves:
            self._alive[np.flatnonzero(self._alive)[~kept]] = False
            return
        self._mask = self._mask[kept]
        padding = int(self._mask.any(axis=0).argmax())  # that all rows have
        self._mask = self._mask[:, padding:]
        self._alive = np.ones(len(self._mask), bool)
        self._cache = {
            name: self._session.upload(numpy_of(value)[kept][:, :, padding:]) for name, value in self._cache.items()
        }

    def spread(self, adapters: Sequence[str | None]) -> list[str | None]:
        """The adapter of every row that is run, of those of the rows that are left."""
        of_rows: list[str | None] = [None] * len(self._alive)
        for place, name in zip(np.flatnonzero(self._alive), adapters, strict=True):
            of_rows[place] = name
        return of_rows


def _widen(values: NDArray[Any], axis: int, more: int) -> NDArray[Any]:
    """With zeros before what is there."""
    before = [(more if dim == axis else 0, 0) for dim in range(values.ndim)]
    return np.pad(values, before)
