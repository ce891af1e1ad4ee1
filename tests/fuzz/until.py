"""Fuzzing for a given time: hypothesis' examples, one seed after another, so that what is found can be found again."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, given, seed, settings
from hypothesis.strategies import SearchStrategy

__all__ = ["fuzz"]

# Of each target.
SECONDS = float(os.environ.get("LORA_DEPLOY_FUZZ_SECONDS", "8"))


def fuzz(check: Callable[[Any], object], inputs: SearchStrategy[Any]) -> int:
    """Give `check` inputs until the time is over; whatever it raises fails the test, with the smallest input found.

    Args:
        check: Takes one input.
        inputs: Where they come from.

    Returns:
        How many were given.
    """
    given_so_far = 0

    def counted(value: Any) -> None:
        nonlocal given_so_far
        given_so_far += 1
        check(value)

    end = time.monotonic() + SECONDS
    options = settings(max_examples=100, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    for number in itertools.count():
        seed(number)(options(given(inputs)(counted)))()
        if time.monotonic() >= end:
            break
    return given_so_far
