"""Tokens become text while they come."""

from __future__ import annotations

from typing import Any

__all__ = ["Pieces"]


class Pieces:
    """The text of one answer, piece by piece.

    Args:
        tokenizer: What decodes it.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._shown = ""

    def add(self, token: int) -> str:
        """What there is to show after the next token; empty while a character is not complete."""
        self._tokens.append(token)
        text: str = self._tokenizer.decode(self._tokens, skip_special_tokens=True)
        # A character of several tokens decodes to the replacement character until the last one is there.
        if text.endswith("\ufffd"):
            return ""
        piece, self._shown = text[len(self._shown) :], text
        return piece

    def rest(self) -> str:
        """What is left when no token comes any more: a character that was never completed."""
        text: str = self._tokenizer.decode(self._tokens, skip_special_tokens=True) if self._tokens else ""
        piece, self._shown = text[len(self._shown) :], text
        return piece
