"""A comparison as a picture: what is paid in size and in time for how much of the training is kept."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_deploy.compare.report import LOWEST, Comparison
from lora_deploy.errors import OutputError
from lora_deploy.pages.labels import Box, place_labels

__all__ = ["PICTURE_NAME", "can_draw", "draw_comparison"]

PICTURE_NAME = "comparison.png"


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def draw_comparison(comparison: Comparison, file: Path) -> None:
    """Draw size and speed against the distance from what was trained, as PNG.

    Args:
        comparison: Rows with an error are left out.
        file: Where it goes.

    Raises:
        OutputError: It could not be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 6.5), dpi=110, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    rows = comparison.measured
    heights = [max(comparison.kl(row), LOWEST) for row in rows]
    names = [row.name for row in rows]
    panels = (
        (left, "size on disk (MB)", [row.megabytes or 0.0 for row in rows]),
        (right, f"speed on {comparison.provider}, as a multiple of {names[0]}", [_speed(row) for row in rows]),
    )
    for axes, heading, widths in panels:
        for number, (width, height, name) in enumerate(zip(widths, heights, names, strict=True)):
            marker = "s" if name.startswith("branch") else "o"
            axes.plot(width, height, marker, color=f"C{number % 10}", markersize=8, markeredgecolor="black")
        axes.set_xlabel(heading)
        axes.set_yscale("log")
        axes.margins(0.18)
        axes.set_xlim(left=0)
        axes.grid(alpha=0.3)
        _draw_scale(axes, comparison)
    left.set_ylabel(f"KL from the trained model on the {comparison.main_text} text\n(nats a token; lower is better)")
    left.set_title("smaller is to the left")
    right.set_title("faster is to the right")
    canvas.draw()  # the layout decides where the labels are
    figure.set_layout_engine("none")
    for axes, _, widths in panels:
        _place_labels(axes, canvas.get_renderer(), list(zip(widths, heights, strict=True)), names)
    try:
        figure.savefig(file, format="png", metadata={"Software": None})
    except OSError as error:
        raise OutputError("the picture could not be written", file=file, found=str(error)) from error


def _speed(row: Any) -> float:
    return row.relative_speed or 0.0


def _draw_scale(axes: Any, comparison: Comparison) -> None:
    """How far the base is without the adapter: at that height nothing of the training is left."""
    height = comparison.kl(comparison.base_alone)
    if height > 0 and math.isfinite(height):
        axes.axhline(height, color="grey", linestyle="--", linewidth=1)
        where = axes.get_yaxis_transform()
        axes.text(0.01, height, "base alone", transform=where, color="grey", fontsize=8, va="bottom")


def _place_labels(axes: Any, renderer: Any, points: Sequence[tuple[float, float]], names: Sequence[str]) -> None:
    """A label at each point, where it hides neither a point nor another label, with a line to a point that is far."""
    pixels = [(float(x), float(y)) for x, y in axes.transData.transform(points)]
    arrow = {"arrowstyle": "-", "color": "grey", "linewidth": 0.7, "shrinkB": 4}
    texts = [_box(text.get_window_extent(renderer)) for text in axes.texts]
    labels = [
        axes.annotate(name, point, xytext=(0, 0), textcoords="offset pixels", fontsize=9, va="center", arrowprops=arrow)
        for point, name in zip(points, names, strict=True)
    ]
    boxes = [label.get_window_extent(renderer) for label in labels]
    frame = _box(axes.get_window_extent(renderer))
    sizes = [(box.width, box.height) for box in boxes]
    for label, place in zip(labels, place_labels(pixels, sizes, frame, texts), strict=True):
        label.set_position(place)


def _box(extent: Any) -> Box:
    return Box(extent.x0, extent.y0, extent.x1, extent.y1)
