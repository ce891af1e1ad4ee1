"""A chart as shapes in pixels, which `templates/parts.html` turns into SVG.

Charts are drawn here, and not by a library, because a page must work as one file without a network, in light and in
dark, and where matplotlib is not installed: shapes have classes, and the page's style sheet their colours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

__all__ = ["LETTER", "LONGEST", "Anchor", "Chart", "Figure"]

LETTER = 6.3  # width of a letter of the style sheet's 12 px, on the safe side
LONGEST = 34  # letters of a name
Anchor = Literal["start", "middle", "end"]


@dataclass(frozen=True)
class Shape:
    """One thing to draw; `kind` says which of the attributes it has.

    Attributes:
        kind: "line", "dot", "square", "text", "rect".
        style: Classes of the style sheet.
        x, y: Its place: of a line unused, of a text its baseline.
        points: Of a line, as SVG has it.
        size: Radius, or half the side.
        width, height: Of a rectangle.
        text: What is written.
        anchor: Where of a text its place is.
        title: What is told when one points at it.
        opacity: Of a rectangle's colour.
        turned: Whether a text runs upwards.
    """

    kind: Literal["line", "dot", "square", "text", "rect"]
    style: str = ""
    x: float = 0.0
    y: float = 0.0
    points: str = ""
    size: float = 4.5
    width: float = 0.0
    height: float = 0.0
    text: str = ""
    anchor: Anchor = "start"
    title: str = ""
    opacity: float = 1.0
    turned: bool = False


@dataclass
class Chart:
    """A picture.

    Attributes:
        width, height: Of it.
        label: What it shows, for those who cannot see it.
        shapes: From back to front.
    """

    width: float
    height: float
    label: str
    shapes: list[Shape] = field(default_factory=list)

    def line(self, points: Sequence[tuple[float, float]], style: str, title: str = "") -> None:
        """A line through points."""
        text = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self.shapes.append(Shape("line", style, points=text, title=title))

    def mark(self, x: float, y: float, style: str, title: str = "", *, square: bool = False, size: float = 4.5) -> None:
        """A dot, or a square."""
        self.shapes.append(Shape("square" if square else "dot", style, x, y, title=title, size=size))

    def text(
        self, x: float, y: float, text: str, anchor: Anchor = "start", style: str = "", *, turned: bool = False
    ) -> None:
        """Words; long ones are cut, and whole where one points at them."""
        short = text if len(text) <= LONGEST or style not in ("", "name") else f"{text[: LONGEST - 1]}…"
        title = text if short != text else ""
        self.shapes.append(Shape("text", style, x, y, text=short, anchor=anchor, title=title, turned=turned))

    def rect(
        self, x: float, y: float, width: float, height: float, style: str, title: str = "", opacity: float = 1.0
    ) -> None:
        """A rectangle."""
        self.shapes.append(Shape("rect", style, x, y, width=width, height=height, title=title, opacity=opacity))


@dataclass(frozen=True)
class Figure:
    """A chart and what is said of it.

    Attributes:
        title: Above it.
        chart: The picture.
        legend: Class of the style sheet, and what it stands for.
        caption: Below it.
        wide: Whether it takes the whole width of the page.
    """

    title: str
    chart: Chart
    legend: Sequence[tuple[str, str]] = ()
    caption: str = ""
    wide: bool = False
