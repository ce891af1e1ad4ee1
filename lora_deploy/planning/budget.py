"""A number of trainable parameters as people write it: 18M, 450k, 1.5B, 921600."""

from __future__ import annotations

import re
from decimal import Decimal

from lora_deploy.errors import UsageError

__all__ = ["format_count", "parse_budget"]

_FACTORS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9}
_NUMBER = re.compile(r"(\d[\d_,]*(?:\.\d+)?)\s*([kmbg]?)", re.IGNORECASE)


def parse_budget(text: str) -> int:
    """Read a budget.

    Args:
        text: Digits, in groups of "," or "_" if one likes, with k, M, B or G behind them for 10^3, 10^6, 10^9.

    Returns:
        Parameters, at least one.

    Raises:
        UsageError: It is no such number, or no whole one.
    """
    match = _NUMBER.fullmatch(text.strip())
    value = Decimal(0)
    if match is not None:
        value = Decimal(re.sub("[_,]", "", match[1])) * _FACTORS[match[2].lower()]
    if value < 1 or value != value.to_integral_value():
        raise UsageError(
            "the budget is no number of parameters",
            found=f"--budget {text}",
            expected="a whole number above zero, such as 921600, 450k or 18M",
        )
    return int(value)


def format_count(count: int) -> str:
    """A number of parameters or operations in few characters: 921600 -> "922k"."""
    for factor, letter in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if count >= factor:
            value = count / factor
            return f"{value:.0f}{letter}" if value >= 100 else f"{value:.3g}{letter}"
    return str(count)
