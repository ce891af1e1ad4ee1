"""Kinds of charts: rows of marks, lines, named points, fields of colour."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from lora_deploy.pages.chart import LETTER, LONGEST, Anchor, Chart
from lora_deploy.pages.labels import Box, place_labels
from lora_deploy.pages.scales import Scale, linear_scale

__all__ = [
    "Mark",
    "Panel",
    "Point",
    "Series",
    "count_scale",
    "draw_heatmap",
    "draw_lines",
    "draw_points",
    "draw_rows",
]

_LINE = 15.0  # height of a line of text
_APART = 6.0  # pixels between marks of one value


@dataclass(frozen=True)
class Mark:
    """A value of a row.

    Attributes:
        value: None where there is none.
        title: What is told when one points at it.
    """

    value: float | None
    title: str = ""


@dataclass(frozen=True)
class Panel:
    """What is drawn of each row, beside its name.

    Attributes:
        heading: What the axis shows.
        scale: The axis.
        series: Marks of each row, by the class of the style sheet.
        limits: Lines across all rows, and what they are.
    """

    heading: str
    scale: Scale
    series: Mapping[str, Sequence[Mark]]
    limits: Sequence[tuple[float, str]] = ()


def draw_rows(names: Sequence[str], panels: Sequence[Panel], label: str, *, width: float = 560) -> Chart:
    """A row for each name, with its marks in each panel.

    Args:
        names: Of the rows.
        panels: Stand beside each other.
        label: What the chart shows.
        width: Of it all.
    """
    step, top = 25.0, 24.0 if any(panel.limits for panel in panels) else 10.0
    left = 14 + LETTER * max([min(len(name), LONGEST) for name in names] or [0])
    bottom = top + step * max(len(names), 1)
    chart = Chart(width, bottom + 42, label)
    for number, name in enumerate(names):
        chart.text(left - 10, top + step * (number + 0.5) + 4, name, "end")
    gap = 46.0
    whole = (width - left - 24 - gap * (len(panels) - 1)) / len(panels)
    for number, panel in enumerate(panels):
        start = left + number * (whole + gap)
        _draw_panel(chart, panel, (start, whole), (top, bottom), step, len(names))
    return chart


def _draw_panel(
    chart: Chart, panel: Panel, across: tuple[float, float], down: tuple[float, float], step: float, rows: int
) -> None:
    (start, width), (top, bottom) = across, down

    def place(value: float) -> float:
        return start + width * panel.scale.place(value)

    for number in range(rows):
        chart.line([(start, top + step * (number + 0.5)), (start + width, top + step * (number + 0.5))], "row")
    _draw_ticks(chart, panel.scale, (start, width), (top, bottom))
    chart.text(start + width / 2, bottom + 36, panel.heading, "middle", "heading")
    for value, what in panel.limits:
        chart.line([(place(value), top - 4), (place(value), bottom)], "limit")
        anchor: Anchor = "end" if panel.scale.place(value) > 0.5 else "start"
        chart.text(place(value), top - 9, what, anchor, "small")
    for number in range(rows):
        found = [(style, marks[number]) for style, marks in panel.series.items() if marks[number].value is not None]
        places = [place(mark.value) for _, mark in found if mark.value is not None]
        # Marks that would hide each other stand one above the other.
        apart = _APART if len(places) > 1 and max(places) - min(places) < 2 * _APART else 0.0
        for order, ((style, mark), x) in enumerate(zip(found, places, strict=True)):
            odd = "" if math.isfinite(mark.value or 0.0) else " odd"
            y = top + step * (number + 0.5) + apart * (order - (len(found) - 1) / 2)
            chart.mark(x, y, f"{style}{odd}", mark.title)


def _draw_ticks(chart: Chart, scale: Scale, across: tuple[float, float], down: tuple[float, float]) -> None:
    """Lines and numbers of a horizontal axis; numbers that would touch are left out."""
    (start, width), (top, bottom) = across, down
    free = -math.inf
    for value, text in scale.ticks:
        x, half = start + width * scale.place(value), LETTER * len(text) / 2
        chart.line([(x, top), (x, bottom)], "grid")
        if x - half > free:
            chart.text(x, bottom + 17, text, "middle", "tick")
            free = x + half + 4


@dataclass(frozen=True)
class Series:
    """A line.

    Attributes:
        style: Class of the style sheet.
        points: x and y, in the order of x.
        titles: What is told of each point, which then has a mark; empty for a line without marks.
    """

    style: str
    points: Sequence[tuple[float, float]]
    titles: Sequence[str] = ()


def draw_lines(
    series: Sequence[Series], x: Scale, y: Scale, headings: tuple[str, str], label: str, *, height: float = 300
) -> Chart:
    """Lines over a common axis. What is not finite is not joined to its neighbours, and stands at the upper end.

    Args:
        series: The lines.
        x, y: The axes.
        headings: Of both.
        label: What the chart shows.
        height: Of it all.
    """
    chart, frame = _frame(x, y, headings, label, height)
    for one in series:
        places = [(frame.x(x.place(a)), frame.y(y.place(b)), math.isfinite(b)) for a, b in one.points]
        piece: list[tuple[float, float]] = []
        for left, top, finite in [*places, (0.0, 0.0, False)]:
            if finite:
                piece.append((left, top))
                continue
            if len(piece) > 1:
                chart.line(piece, f"curve {one.style}")
            piece = []
        for (left, top, finite), title in zip(places, one.titles, strict=False):
            chart.mark(left, top, one.style if finite else f"{one.style} odd", title, size=3.4)
    return chart


@dataclass(frozen=True)
class _Frame:
    left: float
    top: float
    width: float
    height: float

    def x(self, part: float) -> float:
        return self.left + self.width * part

    def y(self, part: float) -> float:
        return self.top + self.height * (1 - part)


def _frame(x: Scale, y: Scale, headings: tuple[str, str], label: str, height: float) -> tuple[Chart, _Frame]:
    """An empty chart with both axes."""
    width, top = 560.0, 12.0
    left = 40 + LETTER * max(len(text) for _, text in y.ticks)
    chart = Chart(width, height, label)
    frame = _Frame(left, top, width - left - 16, height - top - 46)
    for value, text in y.ticks:
        at = frame.y(y.place(value))
        chart.line([(left, at), (left + frame.width, at)], "grid")
        chart.text(left - 8, at + 4, text, "end", "tick")
    _draw_ticks(chart, x, (left, frame.width), (top, top + frame.height))
    chart.text(left + frame.width / 2, height - 8, headings[0], "middle", "heading")
    chart.text(16, top + frame.height / 2, headings[1], "middle", "heading", turned=True)
    return chart, frame


@dataclass(frozen=True)
class Point:
    """A named point.

    Attributes:
        name: Written beside it.
        x, y: Its values.
        title: What is told when one points at it.
        square: Whether it is a square; else it is a dot.
        style: Class of the style sheet.
    """

    name: str
    x: float
    y: float
    title: str
    square: bool
    style: str


def draw_points(
    points: Sequence[Point],
    frontier: Sequence[Point],
    x: Scale,
    y: Scale,
    headings: tuple[str, str],
    label: str,
    *,
    limit: tuple[float, str] | None = None,
    height: float = 400,
) -> Chart:
    """Points with their names beside them, and a line through those that none of the others beats.

    Args:
        points: All of them.
        frontier: Those of the line, in its order.
        x, y: The axes.
        headings: Of both.
        label: What the chart shows.
        limit: A height that is marked, and what it is.
        height: Of it all.
    """
    chart, frame = _frame(x, y, headings, label, height)
    taken = []
    if limit is not None:
        at = frame.y(y.place(limit[0]))
        chart.line([(frame.left, at), (frame.left + frame.width, at)], "limit")
        chart.text(frame.left + 6, at + 14, limit[1], "start", "small")
        taken.append(Box(frame.left, at, frame.left + 6 + LETTER * len(limit[1]), at + 18))
    corners = [(frame.x(x.place(one.x)), frame.y(y.place(one.y))) for one in frontier]
    if len(corners) > 1:
        chart.line(corners, "frontier")
        taken += [box for ends in itertools.pairwise(corners) for box in _along(*ends)]
    places = [(frame.x(x.place(one.x)), frame.y(y.place(one.y))) for one in points]
    sizes = [(LETTER * min(len(one.name), LONGEST), _LINE) for one in points]
    inside = Box(frame.left, frame.top - 8, frame.left + frame.width + 14, frame.top + frame.height)
    for one, (left, top), (width, _), (dx, dy) in zip(
        points, places, sizes, place_labels(places, sizes, inside, taken), strict=True
    ):
        if abs(dy) > _LINE or dx > 2 * _LINE:
            end = left + dx + (width / 2 if dx < 0 < dx + width else 0 if dx >= 0 else width)
            chart.line([(left, top), (end, top + dy - math.copysign(_LINE / 2, dy))], "pointer")
        # Letters are not as wide as reckoned: what is wrong is on the side that is away from the point.
        anchor: Anchor = "start" if dx >= 0 else "end" if dx + width <= 0 else "middle"
        part = {"start": 0.0, "middle": 0.5, "end": 1.0}[anchor]
        chart.text(left + dx + width * part, top + dy + 4, one.name, anchor, "name")
    for one, (left, top) in zip(points, places, strict=True):
        chart.mark(left, top, one.style, one.title, square=one.square, size=6)
    return chart


def _along(start: tuple[float, float], end: tuple[float, float]) -> Iterator[Box]:
    """Boxes that hide a line."""
    count = max(1, int(math.dist(start, end) / 6))
    for number in range(count + 1):
        left, top = (a + (b - a) * number / count for a, b in zip(start, end, strict=True))
        yield Box(left - 2, top - 2, left + 2, top + 2)


def draw_heatmap(
    rows: Sequence[str], columns: Sequence[str], values: Mapping[tuple[int, int], tuple[float, str]], heading: str
) -> Chart:
    """A field for each value, the darker the larger.

    Args:
        rows, columns: Their names.
        values: Of row and column: how dark (0 to 1), and what is told when one points at it.
        heading: Of the columns.
    """
    width = 1040.0
    left = 14 + LETTER * max([min(len(name), LONGEST) for name in rows] or [0])
    step = min((width - left - 10) / max(len(columns), 1), 40.0)
    height, top = 20.0, 6.0
    bottom = top + height * len(rows)
    chart = Chart(width, bottom + 42, heading)
    for number, name in enumerate(rows):
        chart.text(left - 8, top + height * (number + 0.5) + 4, name, "end")
    for (row, column), (part, title) in sorted(values.items()):
        chart.rect(left + step * column, top + height * row, step - 1.5, height - 1.5, "cell", title, part)
    whole = Scale(0, max(len(columns), 1), tuple((number + 0.5, name) for number, name in enumerate(columns)))
    free = -math.inf
    for at, name in whole.ticks:
        x, half = left + step * at, LETTER * len(name) / 2
        if x - half > free:
            chart.text(x, bottom + 14, name, "middle", "tick")
            free = x + half + 6
    chart.text(left + step * len(columns) / 2, bottom + 34, heading, "middle", "heading")
    return chart


def count_scale(count: int) -> Scale:
    """An axis for the numbers from 0 on, whole ones only."""
    scale = linear_scale([0, max(count - 1, 1)])
    return Scale(0, max(count - 1, 1), tuple(tick for tick in scale.ticks if tick[0] == int(tick[0]) < count))
