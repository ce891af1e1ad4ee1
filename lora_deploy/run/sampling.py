"""How the next token is chosen."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lora_deploy.errors import UsageError

__all__ = ["Sampling", "choose_token"]


_COLDEST = 1e-6  # below, logits divided by it are no numbers any more


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen, and how many.

    Attributes:
        max_new_tokens: Stop after so many.
        temperature: 0 takes the most probable token each time; above, tokens are drawn from the distribution.
        top_k: Draw from the k most probable tokens only; 0 for all.
        top_p: Draw from the most probable tokens that together reach this probability only.
        seed: Makes drawing repeatable.
    """

    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    seed: int | None

    def check(self, rows: list[list[int]]) -> None:
        """Make sure that prompts can be continued.

        Raises:
            UsageError: A setting is out of range, or a prompt is empty.
        """
        sound = self.temperature == 0 or (self.temperature >= _COLDEST and math.isfinite(self.temperature))
        sound = sound and 0 < self.top_p <= 1 and self.top_k >= 0 and self.max_new_tokens >= 1
        if rows and all(rows) and sound and (self.seed is None or self.seed >= 0):
            return
        raise UsageError(
            "this cannot be generated from",
            found=f"{', '.join(str(len(row)) for row in rows) or 'no'} prompt tokens, temperature {self.temperature}, "
            f"top_k {self.top_k}, top_p {self.top_p}, max_new_tokens {self.max_new_tokens}, seed {self.seed}",
            expected=f"a prompt, temperature 0 or >= {_COLDEST:g}, top_k >= 0, 0 < top_p <= 1, max_new_tokens >= 1, "
            "seed >= 0",
        )

    def choose(self, logits: NDArray[np.float32], random: np.random.Generator) -> int:
        """The next token, of logits (vocabulary,)."""
        return choose_token(logits, random, self.temperature, self.top_k, self.top_p)


def choose_token(
    logits: NDArray[np.float32], random: np.random.Generator, temperature: float, top_k: int, top_p: float
) -> int:
    """The next token: the most probable one, or one drawn by temperature, top-k and nucleus (top-p) sampling.

    Args:
        logits: (vocabulary,).
        random: Where chance comes from.
        temperature: Divides the logits; 0 for the most probable token.
        top_k: Keep so many tokens; 0 for all.
        top_p: Keep the most probable tokens that together reach this (https://arxiv.org/abs/1904.09751).
    """
    if temperature == 0:
        return int(logits.argmax())
    order = np.argsort(-logits, kind="stable")
    if top_k:
        order = order[:top_k]
    scaled = logits[order].astype(np.float64) / temperature
    probabilities = np.exp(scaled - scaled.max())
    probabilities /= probabilities.sum()
    if top_p < 1:
        kept = int(np.searchsorted(np.cumsum(probabilities), top_p)) + 1
        order, probabilities = order[:kept], probabilities[:kept] / probabilities[:kept].sum()
    return int(random.choice(order, p=probabilities))
