"""Budgets as people write them."""

from __future__ import annotations

import pytest

from lora_deploy.errors import UsageError
from lora_deploy.planning.budget import format_count, parse_budget


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("18M", 18_000_000),
        ("450k", 450_000),
        ("450K", 450_000),
        ("1.5m", 1_500_000),
        ("0.9216M", 921_600),  # 0.9216 * 10**6 as floats is 921599.99…
        ("2B", 2_000_000_000),
        ("2g", 2_000_000_000),
        (" 921600 ", 921_600),
        ("921,600", 921_600),
        ("921_600", 921_600),
        ("1", 1),
    ],
)
def test_what_people_write_is_read(text: str, count: int) -> None:
    assert parse_budget(text) == count


@pytest.mark.parametrize("text", ["", "many", "0", "-5", "0k", "1.5", "1.0005k", "18MB", "M", "1e6", "1 2"])
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="no number of parameters") as caught:
        parse_budget(text)
    assert caught.value.exit_code == 2
    assert text in caught.value.details["found"]


@pytest.mark.parametrize(
    ("count", "text"),
    [(7, "7"), (999, "999"), (1_500, "1.5k"), (921_600, "922k"), (18_000_000, "18M"), (10**10, "10B")],
)
def test_a_count_is_shortened(count: int, text: str) -> None:
    assert format_count(count) == text
