"""Axes have round numbers, in order, that hold what stands on them; and labels hide nothing."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_deploy.pages.labels import Box, place_labels
from lora_deploy.pages.scales import Scale, linear_scale, log_scale, short

NUMBERS = st.floats(allow_nan=True, allow_infinity=True)
POSITIVE = st.floats(min_value=1e-29, max_value=1e14)


def _assert_axis(scale: Scale, most: int) -> None:
    places = [scale.place(value) for value, _ in scale.ticks]
    assert places == sorted(places)
    assert len(set(places)) == len(places) <= most
    assert places[0] == pytest.approx(0, abs=1e-9)
    assert places[-1] == pytest.approx(1, abs=1e-9)


@given(st.lists(st.floats(min_value=-1e12, max_value=1e12), max_size=9))
def test_a_linear_axis_holds_its_values(values: list[float]) -> None:
    scale = linear_scale(values)
    _assert_axis(scale, 9)
    slack = 1e-6 * (scale.high - scale.low)
    for value in values:
        assert scale.low - slack <= value <= scale.high + slack
        assert 0 <= scale.place(value) <= 1


@given(st.lists(POSITIVE, max_size=9), st.booleans())
def test_a_logarithmic_axis_holds_its_values(values: list[float], room: bool) -> None:
    scale = log_scale(values, room=room)
    _assert_axis(scale, 12)
    for value in values:
        assert scale.low - 1e-6 <= math.log10(value) <= scale.high + 1e-6
    assert not room or all(scale.place(value) > 0 for value in values)


@given(st.lists(NUMBERS, max_size=5), NUMBERS)
def test_whatever_is_drawn_is_inside(values: list[float], value: float) -> None:
    for scale in (
        linear_scale(values),
        linear_scale(values, zero=True),
        linear_scale(values, percent=True),
        log_scale(values),
    ):
        assert 0 <= scale.place(value) <= 1


def test_numbers_at_axes_are_those_that_people_write() -> None:
    assert [text for _, text in linear_scale([0, 3]).ticks] == ["0", "1", "2", "3"]
    assert [text for _, text in linear_scale([0.2, 1], percent=True, most=5).ticks][-1] == "100%"
    assert [text for _, text in log_scale([1e-11, 2.0]).ticks] == ["10⁻¹¹", "10⁻⁹", "10⁻⁷", "10⁻⁵", "10⁻³", "0.1", "10"]
    assert [text for _, text in log_scale([0.1, 1.0]).ticks] == ["0.1", "0.2", "0.5", "1"]
    assert [short(value) for value in (0.0, 2.2, 0.123456, 1.8e-11, 123456.0)] == [
        "0",
        "2.2",
        "0.123",
        "1.8e-11",
        "1.2e+05",
    ]
    assert log_scale([1e-3, 1.0]).place(0.0) == 0
    assert log_scale([1e-3, 1.0]).place(math.nan) == 1


@given(st.lists(st.tuples(st.floats(60, 440), st.floats(60, 340)), min_size=1, max_size=6))
def test_labels_hide_neither_points_nor_each_other(points: list[tuple[float, float]]) -> None:
    sizes = [(40.0, 12.0)] * len(points)
    frame = Box(0, 0, 500, 400)
    boxes = [
        Box(x + dx, y + dy - 6, x + dx + 40, y + dy + 6)
        for (x, y), (dx, dy) in zip(points, place_labels(points, sizes, frame), strict=True)
    ]
    for one, other in itertools.combinations(boxes, 2):
        assert not one.overlaps(other)
    for box in boxes:
        assert frame.holds(box)
        assert not any(box.overlaps(Box(x - 7, y - 7, x + 7, y + 7)) for x, y in points)
