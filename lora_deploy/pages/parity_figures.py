"""The pictures of a parity report."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lora_deploy.pages.chart import Figure
from lora_deploy.pages.charts import Mark, Panel, Series, count_scale, draw_heatmap, draw_lines, draw_rows
from lora_deploy.pages.scales import linear_scale, log_scale

if TYPE_CHECKING:
    from lora_deploy.verify.report import ParityReport

__all__ = ["cases_figure", "layers_figure", "survival_figure", "texts_figure"]

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def _reference(report: ParityReport) -> str:
    return "trained model" if report.deployment is None else "deployed weights in PyTorch"


def cases_figure(report: ParityReport) -> Figure:
    """KL and top-1 of each case, with those of the base alone and the limits."""
    rows = report.rows()
    has_control = any(row.control is not None for row in rows)
    kls = [one.mean_kl for row in rows for one in (row.export, row.control) if one is not None]
    top1s = [one.top1 for row in rows for one in (row.export, row.control) if one is not None]

    def marks(kind: str, which: str) -> list[Mark]:
        what = "export" if kind == "export" else "base alone"
        found = [(row.label, getattr(row, kind)) for row in rows]
        return [
            Mark(None)
            if one is None
            else Mark(
                getattr(one, which),
                f"{label}, {what}: KL {one.mean_kl:.2e}, top-1 {one.top1:.2%}, max abs {one.max_abs:.2e}",
            )
            for label, one in found
        ]

    limit = report.tolerance
    panels = [
        Panel(
            "KL (nats a token)",
            log_scale([*kls, limit["kl"] or 1e-6], most=6),
            {"second": marks("control", "mean_kl"), "first": marks("export", "mean_kl")},
            [(limit["kl"] or 0.0, "limit")],
        ),
        Panel(
            "top-1 agreement",
            linear_scale(top1s, percent=True, most=5),
            {"second": marks("control", "top1"), "first": marks("export", "top1")},
            [(limit["top1"] or 0.0, "limit")],
        ),
    ]
    legend = [("first", "this export")] + ([("second", "the base without its adapter")] if has_control else [])
    reference = _reference(report)
    caption = f"Distance from the {reference} of what onnxruntime computes. " + (
        "The base without its adapter has to be outside of the limit, or the check would prove nothing."
        if has_control
        else ""
    )
    names = [row.label for row in rows]
    chart = draw_rows(names, panels, f"KL and top-1 agreement with the {reference}, by case")
    return Figure(f"Distance from the {reference}", chart, legend, caption)


def layers_figure(report: ParityReport) -> Figure | None:
    """The error of each layer, the worst of all adapters; None where there is no cache."""
    if not report.layers:
        return None
    exports = _by_layer([one.export for one in report.layers], worst=max)
    controls = _by_layer([one.control for one in report.layers if one.control is not None], worst=min)
    rounded = report.deployment.cache_errors if report.deployment is not None else []
    names = [
        ("first", exports, f"onnxruntime, against the {_reference(report)}"),
        ("third", rounded, "rounding: the deployed weights, against the trained ones"),
        ("second", controls, "the base without its adapter"),
    ]
    series, legend = [], []
    for style, values, what in names:
        if values:
            titles = [f"layer {number}, {what}: {value:.2e}" for number, value in enumerate(values)]
            series.append(Series(style, [(float(number), value) for number, value in enumerate(values)], titles))
            legend.append((style, what))
    everything = [value for one in series for _, value in one.points]
    chart = draw_lines(
        series,
        count_scale(len(exports)),
        log_scale(everything),
        ("layer", "relative error"),
        "Relative error of the keys and values of each layer",
    )
    caption = "Of the keys and values that each layer leaves in the cache, the larger of the two relative errors."
    if len(report.layers) > 1:
        caption += (
            f" Of {len(report.layers)} runs (each adapter, and none) the export that is furthest off at each layer,"
        )
        caption += " and the control that is nearest."
    return Figure("Error by layer", chart, legend, caption)


def _by_layer(runs: Sequence[Sequence[float]], worst: Any) -> list[float]:
    """NaN is worst, and `max` passes over it."""
    return [next((value for value in values if value != value), worst(values)) for values in zip(*runs, strict=False)]


def texts_figure(report: ParityReport) -> Figure | None:
    """KL and top-1 of the deployed weights on each text; None where they are the trained ones."""
    if report.deployment is None or not report.deployment.texts:
        return None
    texts = report.deployment.texts
    deployed = [
        Mark(text.kl, f"{text.name}, deployed weights: KL {text.kl:.2e}, top-1 {text.top1:.2%}") for text in texts
    ]
    alone = [
        Mark(text.base_kl, "" if text.base_kl is None else f"{text.name}, base alone: KL {text.base_kl:.2e}")
        for text in texts
    ]
    kls = [mark.value for mark in (*deployed, *alone) if mark.value is not None]
    top1 = [Mark(text.top1, f"{text.name}: top-1 {text.top1:.2%}") for text in texts]
    limits = [] if report.max_kl is None else [(report.max_kl, "--max-kl")]
    panels = [
        Panel(
            "KL (nats a token)",
            log_scale([*kls, *(value for value, _ in limits)], most=6),
            {"second": alone, "third": deployed},
            limits,
        ),
        Panel(
            "top-1 agreement",
            linear_scale([text.top1 for text in texts], percent=True, most=5),
            {"third": top1},
        ),
    ]
    legend = [("third", "the deployed weights")]
    if any(mark.value is not None for mark in alone):
        legend.append(("second", "the base without its adapter: how much there is to lose"))
    chart = draw_rows([text.name for text in texts], panels, "KL and top-1 agreement with the trained model, by text")
    caption = (
        "Distance of the deployed weights from the trained ones, both in PyTorch, on text that rounding did not see."
    )
    return Figure("What rounding changes", chart, legend, caption)


def survival_figure(report: ParityReport) -> Figure | None:
    """Share of the update that survives, each kind of layer a row; None where nothing was rounded."""
    if report.deployment is None or not report.deployment.layers:
        return None
    places: dict[tuple[str, str], float] = {}
    for name, value in report.deployment.layers.items():
        numbers = _NUMBER.findall(name)
        kind = _NUMBER.sub("*", name).rpartition("*.")[2] if numbers else name
        places[kind, ".".join(numbers)] = value
    kinds = list(dict.fromkeys(kind for kind, _ in places))
    columns = sorted({column for _, column in places}, key=lambda text: [int(part) for part in text.split(".") if part])
    values = {
        (kinds.index(kind), columns.index(column)): (
            min(max(value, 0.0), 1.0) if value == value else 0.0,
            f"{kind}{', layer ' + column if column else ''}: {value:.1%} of the update survives",
        )
        for (kind, column), value in places.items()
    }
    worst = min(report.deployment.layers.values())
    caption = f"From none of the update (empty) to all of it (full colour); least: {worst:.1%}."
    return Figure(
        "How much of the update survives", draw_heatmap(kinds, columns, values, "layer"), (), caption, wide=True
    )
