"""`report.html` beside `parity.json`: the same numbers, for people."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from lora_deploy.entries import recorded_adapters, recorded_base, recorded_scheme
from lora_deploy.errors import OutputError
from lora_deploy.integrity import MODEL_NAME, PAGE_NAME, REPORT_NAME, UNSEALED, seal_bytes, seal_of
from lora_deploy.manifest import Manifest, read_metadata
from lora_deploy.pages.chart import Figure
from lora_deploy.pages.curves import draw_training
from lora_deploy.pages.parity_figures import cases_figure, layers_figure, survival_figure, texts_figure
from lora_deploy.pages.render import render
from lora_deploy.pages.scales import short
from lora_deploy.terminal import describe_bitsandbytes, describe_rounded_activations

if TYPE_CHECKING:
    from lora_deploy.verify.report import Metrics, ParityReport

__all__ = ["parity_page", "save_report"]

_MODES = {
    None: "merged",
    "fixed": "a branch beside the base, built in",
    "hot-swap": "branches beside the base, given per run",
    "pooled": "branches beside the base, chosen for each row",
}


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
    figures: list[Figure | None] = [cases_figure(report), layers_figure(report), texts_figure(report)]
    if training.chart is not None:
        figures.append(Figure("Training", training.chart, training.legend, " ".join(training.notes)))
    figures.append(survival_figure(report))
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
    warnings = report.deployment.warnings() if report.deployment is not None else []
    described = [describe_rounded_activations(report), describe_bitsandbytes(report)]
    return [*warnings, *(words for words in described if words is not None), *report.notes]


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
