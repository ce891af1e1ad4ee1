"""Drawing a token: the right ones, as often as they should be drawn."""

from __future__ import annotations

import numpy as np
import pytest

from lora_deploy.run.sampling import choose_token

# Out of order, so that a position is no rank.
PROBABILITIES = np.array([0.05, 0.4, 0.1, 0.3, 0.15])
LOGITS = np.log(PROBABILITIES).astype(np.float32) + 7
DRAWS = 4000


def _counts(temperature: float, top_k: int = 0, top_p: float = 1.0, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    drawn = [choose_token(LOGITS, random, temperature, top_k, top_p) for _ in range(DRAWS)]
    return np.bincount(drawn, minlength=5)


def _expected(temperature: float, kept: set[int]) -> np.ndarray:
    weights = np.array([p ** (1 / temperature) if i in kept else 0.0 for i, p in enumerate(PROBABILITIES)])
    return weights / weights.sum()


def _chi_square(counts: np.ndarray, expected: np.ndarray) -> float:
    drawn = expected > 0
    assert counts[~drawn].sum() == 0
    return float((((counts - DRAWS * expected) ** 2)[drawn] / (DRAWS * expected)[drawn]).sum())


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize(
    ("top_k", "top_p", "kept"),
    [
        (0, 1.0, {0, 1, 2, 3, 4}),
        (9, 1.0, {0, 1, 2, 3, 4}),
        (3, 1.0, {1, 3, 4}),
        (1, 1.0, {1}),
        (0, 1e-6, {1}),
    ],
)
def test_tokens_are_drawn_as_often_as_their_probability_says(
    temperature: float, top_k: int, top_p: float, kept: set[int]
) -> None:
    """23.5 is the chi-square that four degrees of freedom exceed once in ten thousand times."""
    expected = _expected(temperature, kept)
    counts = _counts(temperature, top_k, top_p)
    assert _chi_square(counts, expected) < 23.5
    if len(kept) > 1:  # and the test would see another temperature
        assert _chi_square(counts, _expected(temperature * 2, kept)) > 35


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [(0.39, {1}), (0.41, {1, 3}), (0.69, {1, 3}), (0.71, {1, 3, 4}), (0.86, {1, 2, 3, 4}), (0.96, {0, 1, 2, 3, 4})],
)
def test_the_nucleus_is_the_smallest_set_that_reaches_the_probability(top_p: float, kept: set[int]) -> None:
    counts = _counts(1.0, top_p=top_p)
    assert set(np.flatnonzero(counts).tolist()) == kept
    assert _chi_square(counts, _expected(1.0, kept)) < 23.5


def test_the_nucleus_is_taken_of_what_top_k_leaves() -> None:
    """Of 0.4 and 0.3 alone the first has 0.57 of the probability."""
    assert set(np.flatnonzero(_counts(1.0, top_k=2, top_p=0.55)).tolist()) == {1}
    assert set(np.flatnonzero(_counts(1.0, top_k=2, top_p=0.6)).tolist()) == {1, 3}


def test_temperature_nought_is_the_most_probable_token_whatever_the_rest_says() -> None:
    random = np.random.default_rng(0)
    assert {choose_token(LOGITS, random, 0.0, top_k, top_p) for top_k in (0, 3) for top_p in (0.1, 1.0)} == {1}


def test_a_seed_decides_what_is_drawn() -> None:
    assert np.array_equal(_counts(1.0, seed=4), _counts(1.0, seed=4))
    assert not np.array_equal(_counts(1.0, seed=4), _counts(1.0, seed=5))


def test_large_logits_do_not_overflow() -> None:
    logits = np.array([1e4, 1e4 + 1, -1e4], np.float32)
    assert choose_token(logits, np.random.default_rng(0), 0.01, 0, 1.0) == 1
