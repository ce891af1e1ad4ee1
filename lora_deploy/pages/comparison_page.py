"""`report.html` beside `comparison.json`: what each precision costs and keeps, and which none of the others beats."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from lora_deploy.compare.report import LOWEST, Comparison, Row
from lora_deploy.pages.chart import Figure
from lora_deploy.pages.charts import Mark, Panel, Point, draw_points, draw_rows
from lora_deploy.pages.curves import draw_training
from lora_deploy.pages.render import render
from lora_deploy.pages.scales import linear_scale, log_scale, short

__all__ = ["comparison_page", "frontier"]

# What is the same for all rows, or names a place of this machine.
_LEFT_OUT = ("--model", "--adapter", "--output")
_TEXTS = {"task": ("first", "on the task's text"), "general": ("second", "on general text")}


def comparison_page(comparison: Comparison) -> bytes:
    """The page of a comparison, with the course of the training where its log lies beside the adapter.

    Args:
        comparison: What was found.
    """
    training = draw_training({_name(comparison.adapter): comparison.adapter})
    figures = [] if not comparison.measured else [*_frontiers(comparison), _by_precision(comparison)]
    if training.chart is not None:
        figures.append(Figure("Training", training.chart, training.legend, " ".join(training.notes)))
    # Of an error the first line: the others name files.
    notes = [f"{row.name} failed: {row.error.splitlines()[0]}" for row in comparison.rows if row.error]
    return render(
        "comparison.html",
        title=_name(comparison.adapter),
        subtitle=f"on {_name(comparison.model)}; in onnxruntime on {comparison.provider}, against the trained model",
        best=_best(comparison),
        figures=figures,
        texts=[text.name for text in comparison.trained.texts],
        rows=[(row, _flags(row)) for row in (*comparison.rows, comparison.trained, comparison.base_alone)],
        notes=[*notes, *comparison.warnings, *([] if training.chart is not None else training.notes)],
        facts=_facts(comparison),
    )


def _name(place: str) -> str:
    """A hub id as it is; of a directory the last part, so that the page names no place of this machine."""
    return Path(place).resolve().name if Path(place).is_dir() else place


def _flags(row: Row) -> str:
    """How to export a row, without what is the same for all; of files only the names."""
    words = iter(shlex.split(row.command)[2:])
    kept: list[str] = []
    for word in words:
        if word in _LEFT_OUT:
            next(words, None)
        else:
            kept.append(Path(word).name if kept[-1:] == ["--calibration"] else word)
    return shlex.join(kept) + (f"   (run with --weights {row.weights})" if row.weights != "stored" else "")


def _best(comparison: Comparison) -> list[tuple[str, Row, str, float]]:
    values: Mapping[str, Callable[[Row], tuple[str, float]]] = {
        "smallest": lambda row: (f"{row.megabytes or 0:,.0f} MB", row.megabytes or 0.0),
        "fastest": lambda row: (f"{row.tokens_per_second or 0:,.0f} tokens/s", row.tokens_per_second or 0.0),
        "most faithful": lambda row: (f"KL {short(comparison.kl(row))}", comparison.kl(row)),
    }
    return [(word, row, *values[word](row)) for word, row in comparison.best().items()]


def frontier(rows: Sequence[Row], cost: Callable[[Row], float], distance: Callable[[Row], float]) -> list[Row]:
    """The rows that no other beats: none costs no more and is no further off, and less of one of the two.

    Args:
        rows: All.
        cost: Of a row; less is better.
        distance: From what was trained; less is better.

    Returns:
        They, the cheapest first.
    """
    kept: list[Row] = []
    for row in sorted(rows, key=lambda row: (cost(row), distance(row))):
        if not kept or distance(row) < distance(kept[-1]):
            kept.append(row)
    return kept


def _frontiers(comparison: Comparison) -> list[Figure]:
    rows = comparison.measured
    yardstick = rows[0].name
    panels: list[tuple[str, str, Callable[[Row], float], int, str]] = [
        ("Size against fidelity", "size on disk (MB)", _size, 1, "smaller is to the left"),
        ("Speed against fidelity", f"speed, as a multiple of {yardstick}", _speed, -1, "faster is to the right"),
    ]
    alone = comparison.kl(comparison.base_alone)
    limit = (alone, "base alone") if alone > 0 and math.isfinite(alone) else None
    kls = [_drawn(comparison.kl(row)) for row in rows]
    down = log_scale([*kls, *([alone] if limit else [])], room=True)
    figures = []
    for title, heading, value, sign, better in panels:
        points = {
            row.name: Point(
                row.name,
                value(row),
                _drawn(comparison.kl(row)),
                _describe(comparison, row),
                row.name.startswith("branch"),
                "second" if row.name.startswith("branch") else "first",
            )
            for row in rows
        }
        kept = frontier(rows, partial(_cost, value, sign), lambda row: _drawn(comparison.kl(row)))
        best = [points[row.name] for row in kept]
        chart = draw_points(
            list(points.values()),
            best,
            linear_scale([1.05 * point.x for point in points.values()], zero=True),
            down,
            (heading, f"KL on the {comparison.main_text} text (nats a token)"),
            f"{title}: " + ", ".join(f"{name}: {point.x:.4g}, KL {point.y:.1e}" for name, point in points.items()),
            limit=limit,
        )
        legend = [("first", "merged"), ("second square", "branch"), ("frontier", "what none of the others beats")]
        caption = (
            f"Lower is nearer to what was trained; {better}. Less than {LOWEST:g} is drawn there, and is rounding."
        )
        figures.append(Figure(title, chart, legend, caption))
    return figures


def _drawn(kl: float) -> float:
    return max(kl, LOWEST)


def _cost(value: Callable[[Row], float], sign: int, row: Row) -> float:
    return sign * value(row)


def _size(row: Row) -> float:
    return row.megabytes or 0.0


def _speed(row: Row) -> float:
    return row.relative_speed or 0.0


def _describe(comparison: Comparison, row: Row) -> str:
    return (
        f"{row.name}: {_size(row):,.0f} MB, {row.tokens_per_second or 0:,.1f} tokens/s ({_speed(row):.2f} x), "
        f"KL {short(comparison.kl(row))}"
    )


def _by_precision(comparison: Comparison) -> Figure:
    rows = [*comparison.measured, comparison.base_alone]
    kls: dict[str, list[Mark]] = {}
    top1s: dict[str, list[Mark]] = {}
    legend = []
    for text in comparison.trained.texts:
        style, words = _TEXTS.get(text.name, ("third", f"on {text.name}"))
        legend.append((style, words))
        found = [(row.name, row.text(text.name)) for row in rows]
        tips = ["" if one is None else f"{name}, {words}: KL {one.kl:.2e}, top-1 {one.top1:.2%}" for name, one in found]
        kls[style] = [
            Mark(None if one is None else _drawn(one.kl), tip) for (_, one), tip in zip(found, tips, strict=True)
        ]
        top1s[style] = [Mark(None if one is None else one.top1, tip) for (_, one), tip in zip(found, tips, strict=True)]
    values = [mark.value for marks in kls.values() for mark in marks if mark.value is not None]
    shares = [mark.value for marks in top1s.values() for mark in marks if mark.value is not None]
    panels = [
        Panel("KL (nats a token)", log_scale(values, most=6), kls),
        Panel("top-1 agreement", linear_scale(shares, percent=True, most=5), top1s),
    ]
    chart = draw_rows([row.name for row in rows], panels, "KL and top-1 agreement with the trained model, by precision")
    return Figure(
        "KL and top-1 by precision",
        chart,
        legend,
        f"Distance of each from the trained model. KL of less than {LOWEST:g} is drawn there.",
    )


def _facts(comparison: Comparison) -> list[tuple[str, str]]:
    facts = [("libraries", ", ".join(f"{name} {version}" for name, version in comparison.versions.items()))]
    if comparison.cpu_count is not None:
        facts.append(("processors", f"{comparison.cpu_count} of the machine"))
    facts += [
        (f"{text.name} text", f"{Path(text.source).name or 'random tokens'}, {text.tokens} tokens predicted")
        for text in comparison.trained.texts
    ]
    return facts
