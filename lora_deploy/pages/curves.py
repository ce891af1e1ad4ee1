"""The picture of a training, or of several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lora_deploy.errors import LoraDeployError
from lora_deploy.pages.chart import Chart
from lora_deploy.pages.charts import Series, draw_lines
from lora_deploy.pages.scales import linear_scale
from lora_deploy.pages.training_log import Curve, read_curve

__all__ = ["Training", "draw_training"]

STYLES = ("first", "second", "third", "fourth", "fifth", "sixth")
_MOST = 400  # points of a line
_MARKED = 30  # points up to which each has a mark


@dataclass
class Training:
    """What is shown of the trainings.

    Attributes:
        chart: None where no adapter has a log.
        legend: Class of the style sheet, and what it stands for.
        notes: What the reader should know.
    """

    chart: Chart | None = None
    legend: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def draw_training(adapters: Mapping[str, str | Path]) -> Training:
    """The losses of the trainings whose logs lie beside the adapters.

    Args:
        adapters: Directories by name; an empty one for an adapter that has none.
    """
    found, curves = Training(), {}
    for name, directory in adapters.items():
        try:
            curve = read_curve(directory) if str(directory) else None
        except LoraDeployError as error:
            found.notes.append(f"the log of the training of {name} is left out: {error.summary}")
            continue
        if curve is not None:
            curves[name] = curve
    if len(curves) > len(STYLES):
        found.notes.append(f"{len(curves) - len(STYLES)} more adapters have a log")
        curves = dict(list(curves.items())[: len(STYLES)])
    if not curves:
        return found
    series = []
    for style, (name, curve) in zip(STYLES, curves.items(), strict=False):
        for kind, points in _kinds(curve, len(curves)):
            drawn, group = _thin(points)
            if group > 1:
                found.notes.append(f"each point of the {kind} loss of {name} is the mean of {group} logged ones")
            which = "second" if kind == "evaluation" and len(curves) == 1 else style
            marked = kind == "evaluation" or len(drawn) <= _MARKED
            titles = [f"{name}, step {step:g}: {kind} loss {loss:.4g}" for step, loss in drawn] if marked else []
            series.append(Series(which, drawn, titles))
            found.legend.append((which, kind if len(curves) == 1 else name))
    everything = [point for one in series for point in one.points]
    found.chart = draw_lines(
        series,
        linear_scale([step for step, _ in everything], zero=True),
        linear_scale([loss for _, loss in everything], zero=True),
        ("optimizer step", "loss (nats a token)"),
        "Loss by optimizer step",
    )
    return found


def _kinds(curve: Curve, together: int) -> list[tuple[str, Sequence[tuple[int, float]]]]:
    """Both losses of one adapter; of several the training's, for the page has not as many colours."""
    kinds: list[tuple[str, Sequence[tuple[int, float]]]] = [
        ("training", curve.loss),
        ("evaluation", curve.eval_loss),
    ]
    present = [(kind, points) for kind, points in kinds if points]
    return present if together == 1 else present[:1]


def _thin(points: Sequence[tuple[int, float]]) -> tuple[list[tuple[float, float]], int]:
    """Means of so many neighbours each that few enough points are left, and how many that are."""
    group = -(-len(points) // _MOST)
    parts = [points[start : start + group] for start in range(0, len(points), group)]
    return [
        (sum(step for step, _ in part) / len(part), sum(loss for _, loss in part) / len(part)) for part in parts
    ], group
