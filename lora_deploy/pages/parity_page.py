"""`report.html` beside `parity.json`: the same numbers, for people."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from lora_deploy.entries import recorded_adapters, recorded_base, recorded_scheme
from lora_deploy.errors import OutputError
from lora_deploy.integrity import MODEL_NAME, PAGE_NAME, REPORT_NAME, UNSEALED, seal_bytes, seal_of
from lora_deploy.manifest import Manifest, read_metadata
from lora_deploy.pages.charts import (
    Figure,
    Mark,
    Panel,
    Series,
    count_scale,
    draw_heatmap,
    draw_lines,
    draw_rows,
)
from lora_deploy.pages.curves import draw_training
from lora_deploy.pages.render import render
from lora_deploy.pages.scales import linear_scale, log_scale, short
from lora_deploy.verify.report import Metrics, ParityReport

__all__ = ["parity_page", "save_report"]

_MODES = {
    None: "merged",
    "fixed": "a branch beside the base, built in",
    "hot-swap": "branches beside the base, given per run",
    "pooled": "branches beside the base, chosen for each row",
}
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def save_report(directory: Path, report: ParityReport, adapters: Mapping[str, str | Path]) -> None:
    """Write `parity.json` and the page that shows it, each whole or not at all; a kill may leave the first alone.

    Args:
        directory: The export.
        report: What was found.
        adapters: Directories of the adapters by name, where the logs of their trainings may be; empty for those that
            have none.

    Raises:
        OutputError: One of them could not be written.
    """
    report.save(directory)
    file = directory / PAGE_NAME
    partial = directory / f".{PAGE_NAME}.partial"
    try:
        partial.write_bytes(seal_bytes(PAGE_NAME, parity_page(directory, report, adapters)))
        partial.replace(file)
    except OSError as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise OutputError("the page of the parity report could not be written", file=file, found=str(error)) from error


def parity_page(directory: Path, report: ParityReport, adapters: Mapping[str, str | Path]) -> bytes:
    """The page of the `parity.json` that is there, unsealed. No time and no path is in it.

    Args:
        directory: The export.
        report: What `parity.json` holds.
        adapters: As `save_report` takes them.
    """
    entries = read_metadata(directory)
    manifest = Manifest.read(entries, directory / MODEL_NAME)
    training = draw_training(adapters)
    figures = [_cases_figure(report), _layers_figure(report), _texts_figure(report)]
    if training.chart is not None:
        figures.append(Figure("Training", training.chart, training.legend, " ".join(training.notes)))
    figures.append(_survival_figure(report))
    return render(
        "parity.html",
        title=_title(entries, directory),
        subtitle=_subtitle(manifest, entries, report),
        verdict=_verdict(report),
        report=report,
        notes=_notes(report) + ([] if training.chart is not None else training.notes),
        tiles=_tiles(report),
        figures=[figure for figure in figures if figure is not None],
        facts=_facts(manifest, entries, directory),
        seals={
            "model_sha256": seal_of(MODEL_NAME, (directory / MODEL_NAME).read_bytes()),
            "report_sha256": seal_of(REPORT_NAME, (directory / REPORT_NAME).read_bytes()),
            "page_sha256": UNSEALED,
        },
    )


def _title(entries: Mapping[str, str], directory: Path) -> str:
    names = list(recorded_adapters(entries, directory / MODEL_NAME))
    if not names:
        return "The base alone"
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _subtitle(manifest: Manifest, entries: Mapping[str, str], report: ParityReport) -> str:
    adapters = bool(entries.get("lora_deploy.adapters"))
    mode = _MODES[manifest.branch] if adapters else "without an adapter"
    weights = f"weights in {manifest.precision}"
    if manifest.precision != manifest.compute_dtype:
        weights += f", computed in {manifest.compute_dtype}"
    return f"{mode}; {weights}; checked in onnxruntime on {report.provider}"


def _verdict(report: ParityReport) -> str:
    if not report.passed:
        return f"Failed: {report.failures()}"
    if report.deployment is None:
        return "Passed: onnxruntime computes what was trained"
    return (
        "Passed: onnxruntime computes what the deployed weights say; how far these are from the trained ones is below"
    )


def _notes(report: ParityReport) -> list[str]:
    """What limits the check, and what a user should know before this is deployed."""
    notes = list(report.deployment.warnings()) if report.deployment is not None else []
    if report.activation_rounding is not None:
        extra = report.activation_rounding
        notes.append(
            f"accuracy level 4 rounds activations too, which is no part of the gate: KL {extra.mean_kl:.1e}, top-1 "
            f"{extra.top1:.1%} from the same graph without"
        )
    if report.bitsandbytes_gap is not None:
        gap = report.bitsandbytes_gap
        notes.append(
            f"bitsandbytes' own forward, which quantizes activations, is itself {gap.max_abs:.2g} (max abs), KL "
            f"{gap.mean_kl:.1e} from the trained function"
        )
    return [*notes, *report.notes]


def _tiles(report: ParityReport) -> list[tuple[str, str, float, str]]:
    """What it is, how it is written, its value, and what it should be."""
    exports = [case.export for case in report.cases]
    controls = [case.control for case in report.cases if case.control is not None]
    limit = report.tolerance
    kl, top1 = _worst(exports, "mean_kl"), min((one.top1 for one in exports), default=1.0)
    tiles = [
        ("largest KL, nats a token", short(kl), kl, f"at most {limit['kl']:g}"),
        ("smallest top-1 agreement", f"{top1:.1%}", top1, f"at least {limit['top1']:.1%}"),
    ]
    if controls:
        nearest = min(one.mean_kl for one in controls)
        tiles.append(("smallest KL of the base alone", short(nearest), nearest, "must be outside"))
    if report.deployment is not None:
        deployment = report.deployment
        tiles.append(("KL that rounding adds", short(deployment.largest_kl), deployment.largest_kl, _max_kl(report)))
        tiles.append(("bits a weight", f"{deployment.bits:.2f}", deployment.bits, "linear layers"))
        if deployment.survives is not None:
            tiles.append(
                ("update that survives rounding", f"{deployment.survives:.1%}", deployment.survives, "all layers")
            )
    return tiles


def _max_kl(report: ParityReport) -> str:
    return "no limit was set" if report.max_kl is None else f"at most {report.max_kl:g}"


def _worst(metrics: Sequence[Metrics], name: str) -> float:
    values: list[float] = [getattr(one, name) for one in metrics]
    return next((value for value in values if value != value), max(values, default=0.0))


def _reference(report: ParityReport) -> str:
    return "trained model" if report.deployment is None else "deployed weights in PyTorch"


def _cases_figure(report: ParityReport) -> Figure:
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


def _layers_figure(report: ParityReport) -> Figure | None:
    """The worst of all adapters at each layer."""
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


def _texts_figure(report: ParityReport) -> Figure | None:
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


def _survival_figure(report: ParityReport) -> Figure | None:
    """Share of the update that survives, each kind of layer a row."""
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


def _facts(manifest: Manifest, entries: Mapping[str, str], directory: Path) -> list[tuple[str, str]]:
    """What the export was made of."""
    graph = directory / MODEL_NAME
    base = recorded_base(entries, graph) or "a local directory"
    facts = [("base", f"{base}, sha256 {manifest.base_sha256[:16]}…")]
    if manifest.quantization:
        scheme = recorded_scheme(manifest.quantization, graph)
        facts.append(("trained on", "the base as it is" if scheme.method == "none" else f"the base in {scheme}"))
    for name, recorded in recorded_adapters(entries, graph).items():
        config = recorded.get("config")
        config = config if isinstance(config, dict) else {}
        known = [
            f"{what} {config[key]:g}"
            for what, key in (("rank", "r"), ("alpha", "lora_alpha"))
            if _is_number(config.get(key))
        ]
        facts.append((f"adapter {name}", ", ".join([*known, f"sha256 {recorded['sha256'][:16]}…"])))
    with suppress(ValueError):
        versions = json.loads(entries.get("lora_deploy.versions", "{}"))
        if isinstance(versions, dict):
            facts.append(("exported with", ", ".join(f"{name} {version}" for name, version in versions.items())))
    return facts


def _is_number(value: object) -> bool:
    return type(value) in (int, float)
