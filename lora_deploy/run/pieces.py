"""Tokens become text while they come."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["Pieces"]


class Pieces:
    """The text of one answer, piece by piece.

    What a token adds depends on those just before it (spaces, characters of several tokens), so that each time the last
    piece is decoded again, and no more: an answer of any length costs the same for each token.

    Args:
        tokenizer: What decodes it.
        after: The end of the text that it goes on with; empty where it begins anew, without a space in front.
    """

    def __init__(self, tokenizer: Any, after: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._tokens = list(after)  # of the last piece, and of what is not shown yet
        self._shown = len(self._tokens)  # of them

    def add(self, token: int) -> str:
        """What there is to show after the next token; empty while a character is not complete."""
        self._tokens.append(token)
        piece = self._new()
        # A character of several tokens decodes to the replacement character until the last one is there.
        if not piece or piece.endswith("\ufffd"):
            return ""
        self._tokens, self._shown = self._tokens[self._shown :], len(self._tokens) - self._shown
        return piece

    def rest(self) -> str:
        """What is left when no token comes any more: a character that was never completed."""
        piece = self._new()
        self._shown = len(self._tokens)
        return piece

    def _new(self) -> str:
        # A prompt may end inside a character, which the first tokens complete.
        before, now = self._decode(self._tokens[: self._shown]).rstrip("\ufffd"), self._decode(self._tokens)
        return now[len(before) :]

    def _decode(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=True) if tokens else ""
        return text
