"""Axes: which numbers stand at them, and where a value has its place."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["Scale", "linear_scale", "log_scale", "short"]

_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_LEAST, _LARGEST = 1e-30, 1e15  # what is beyond is drawn at the end
_FEW_DECADES, _NEAR = 2, 0.5


@dataclass(frozen=True)
class Scale:
    """One axis.

    Attributes:
        low, high: Its ends; of a logarithmic one, their decimal logarithms.
        ticks: Values, and how they are written.
        is_log: Whether it is logarithmic.
    """

    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]
    is_log: bool = False

    def place(self, value: float) -> float:
        """Where a value stands, 0 at the low end and 1 at the high one, where what is beyond is put, too.

        A logarithmic axis has no zero: that stands at its low end. What is no number stands at the high one.
        """
        if math.isnan(value):
            return 1.0
        if self.is_log:
            if value <= 0:
                return 0.0
            value = math.log10(value) if math.isfinite(value) else math.inf
        return min(max((value - self.low) / (self.high - self.low), 0.0), 1.0)


def linear_scale(values: Iterable[float], *, zero: bool = False, percent: bool = False, most: int = 6) -> Scale:
    """An axis for values, with round numbers at it.

    Args:
        values: What stands on it; what is not finite is left out.
        zero: Whether it shows zero.
        percent: Whether its numbers are written as percentages; it then ends at 100% at most.
        most: How many numbers at most.
    """
    finite = [min(max(value, -_LARGEST), _LARGEST) for value in values if math.isfinite(value)] or [0.0, 1.0]
    finite += [0.0] if zero else []
    low, high = min(finite), max(finite)
    if percent:
        low, high = min(low, 0.9), 1.0
    if high - low <= 1e-9 * max(abs(low), abs(high), _LEAST):
        low, high = low - max(abs(low), 1.0) / 2, high + max(abs(high), 1.0) / 2
    rough = (high - low) / max(most - 1, 1)
    base = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * base for factor in (1, 2, 2.5, 5, 10) if factor * base >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = [number * step for number in range(first, last + 1)]
    shown = step * 100 if percent else step
    digits = next((count for count in range(9) if math.isclose(round(shown, count), shown, rel_tol=1e-9)), None)
    texts = [
        f"{tick:.2g}" if digits is None else f"{100 * tick:.{digits}f}%" if percent else f"{tick:,.{digits}f}"
        for tick in ticks
    ]
    return Scale(ticks[0], ticks[-1], tuple(zip(ticks, texts, strict=True)))


def log_scale(values: Iterable[float], *, most: int = 7, room: bool = False) -> Scale:
    """An axis of whole decades.

    Args:
        values: What stands on it; what is not finite, or not more than zero, is left out.
        most: How many numbers at most.
        room: Whether the least value does not stand at the very end.
    """
    usable = [min(max(value, _LEAST), _LARGEST) for value in values if value > 0 and math.isfinite(value)]
    exponents = [math.log10(value) for value in usable] or [-1.0]
    low, high = math.floor(min(exponents) + 1e-9), math.ceil(max(exponents) - 1e-9)
    high = max(high, low + 1)
    low -= room and min(exponents) < low + _NEAR
    step = max(1, math.ceil((high - low) / (most - 1)))
    low = high - step * math.ceil((high - low) / step)
    ticks = [(10.0**exponent, _write(1, exponent)) for exponent in range(low, high + 1, step)]
    if high - low <= _FEW_DECADES:
        ticks += [(n * 10.0**exponent, _write(n, exponent)) for exponent in range(low, high) for n in (2, 5)]
    return Scale(low, high, tuple(sorted(ticks)), is_log=True)


def _write(factor: int, exponent: int) -> str:
    if -3 < exponent < 3:
        return f"{factor * 10.0**exponent:g}"
    power = f"10{str(exponent).translate(_SUPERSCRIPTS)}"
    return power if factor == 1 else f"{factor}·{power}"


def short(value: float) -> str:
    """A number that may be of any size, in a few letters."""
    return f"{value:.3g}" if value == 0 or 1e-2 <= abs(value) < 1e4 else f"{value:.1e}"
