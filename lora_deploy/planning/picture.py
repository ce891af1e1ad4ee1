"""A study as a picture: the held-out loss of each choice, every seed a point."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lora_deploy.errors import OutputError
from lora_deploy.planning.choices import FAIR
from lora_deploy.planning.report import Study

__all__ = ["PICTURE_NAME", "draw_study"]

PICTURE_NAME = "plan.png"


def draw_study(study: Study, file: Path) -> None:
    """Draw loss, and exact answers where there are any, of the choices beside each other, as PNG.

    Args:
        study: Rows without a result are left out.
        file: Where it goes.

    Raises:
        OutputError: It could not be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in study.rows if row.losses]
    panels: list[tuple[str, list[list[float]], float | None]] = [
        ("held-out loss (nats a token; lower is better)", [row.losses for row in rows], None)
    ]
    if study.base.answered:
        heading = f"answered exactly, of {study.base.answered} (higher is better)"
        panels.append((heading, [row.exact for row in rows], study.base.exact))
    figure = Figure(figsize=(5.2 * len(panels) + 1.5, 0.42 * len(rows) + 1.6), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (heading, values, base) in zip(grid, panels, strict=True):
        _draw_panel(axes, heading, values, base)
    grid[0].set_yticks(range(len(rows)), [f"{row.name}, r={row.rank}" for row in rows])
    grid[0].invert_yaxis()
    figure.suptitle(f"{study.settings['budget']:,} trainable parameters, to within {FAIR:.0%}", fontsize=10)
    try:
        figure.savefig(file, format="png", metadata={"Software": None})
    except OSError as error:
        raise OutputError("the picture could not be written", file=file, found=str(error)) from error


def _draw_panel(axes: Any, heading: str, values: list[list[float]], base: float | None) -> None:
    """Bars for means, a point for each seed."""
    for at, some in enumerate(values):
        if not some:
            continue
        axes.barh(at, sum(some) / len(some), height=0.65, color="C0", alpha=0.35)
        axes.plot(some, [at] * len(some), "o", color="C0", markersize=4, markeredgecolor="black", markeredgewidth=0.5)
    if base is not None:
        axes.axvline(base, color="grey", linestyle="--", linewidth=1)
        axes.text(base, 1.01, "base alone", transform=axes.get_xaxis_transform(), color="grey", fontsize=8, ha="center")
    axes.set_xlabel(heading)
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3, axis="x")
