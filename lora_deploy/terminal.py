"""What the command line shows: progress, tables, JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from lora_deploy.verify import ParityReport
    from lora_deploy.verify.codes import CodesResult

__all__ = [
    "describe_bitsandbytes",
    "describe_rounded_activations",
    "make_console",
    "print_json",
    "print_page",
    "print_report",
    "show_progress",
]


def make_console(quiet: bool = False, as_json: bool = False) -> Console:
    """Where progress and tables go: the screen, nowhere with --quiet, or stderr where stdout carries JSON."""
    from rich.console import Console

    return Console(quiet=quiet, stderr=as_json, highlight=False)


def print_json(values: Any) -> None:
    """Print for scripts; whatever JSON does not know is printed as text."""
    print(json.dumps(values, indent=2, sort_keys=True, default=str))


@contextmanager
def show_progress(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """A bar for each task that reports its progress."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description:<16}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
    with Progress(*columns, TimeElapsedColumn(), console=console, disable=console.quiet) as progress:
        preparing = progress.add_task("preparing", total=None)
        tasks: dict[str, Any] = {}

        def on_progress(name: str, done: int, total: int) -> None:
            if name not in tasks:
                progress.update(preparing, total=1, completed=1)
                tasks[name] = progress.add_task(name, total=total)
            progress.update(tasks[name], completed=done, total=total)

        yield on_progress


def print_report(console: Console, report: ParityReport) -> None:
    """The cases of a parity check, how far deployed weights are from trained ones, and what limits it."""
    console.print(report.table())
    if report.codes is not None:
        size = report.codes.bytes / 1e6
        how = _describe_codes(report.codes)
        console.print(f"codes of {report.codes.layers} layers, {size:,.1f} MB: {how}", soft_wrap=True)
    rounded = describe_rounded_activations(report)
    if rounded is not None:
        console.print(rounded, soft_wrap=True)
    _print_deployment(console, report)
    for note in report.notes:
        console.print(f"note: {note}", soft_wrap=True, markup=False)
    gap = describe_bitsandbytes(report)
    if gap is not None:
        console.print(f"note: {gap}", soft_wrap=True)


def print_page(console: Console, directory: Path) -> None:
    """Where the pictures of a parity check are, if it left some."""
    from lora_deploy.integrity import PAGE_NAME

    page = directory / PAGE_NAME
    if page.is_file():
        console.print(f"pictures: {page}", soft_wrap=True, markup=False)


def describe_rounded_activations(report: ParityReport) -> str | None:
    """What accuracy level 4 adds, in words; None where nothing is rounded so."""
    if report.activation_rounding is None:
        return None
    extra = report.activation_rounding
    return (
        f"accuracy level 4 rounds activations too, which is no part of the gate: KL {extra.mean_kl:.1e}, top-1 "
        f"{extra.top1:.1%} from the same graph without"
    )


def describe_bitsandbytes(report: ParityReport) -> str | None:
    """How far bitsandbytes' own forward is from the twin, in words; None where that was not measured."""
    if report.bitsandbytes_gap is None:
        return None
    gap = report.bitsandbytes_gap
    return (
        f"bitsandbytes' own forward, which quantizes activations, is itself {gap.max_abs:.2g} (max abs), "
        f"KL {gap.mean_kl:.1e} from the trained function"
    )


def _describe_codes(codes: CodesResult) -> str:
    how = "the base's own, bit for bit" if codes.exact else "the base's values transcoded to 8 bits"
    if codes.requantized:
        how = "made anew of the merged weights, as they were recorded"
    return how if codes.scales == "float32" else f"{how}; their scales are rounded to {codes.scales}"


def _print_deployment(console: Console, report: ParityReport) -> None:
    if report.deployment is None:
        console.print("the deployed weights are the trained ones, up to the rounding to the type", soft_wrap=True)
        return
    console.print(report.deployment.table())
    console.print(report.deployment.summary(), soft_wrap=True, markup=False)
    for warning in report.deployment.warnings():
        console.print(f"warning: {warning}", style="yellow", soft_wrap=True, markup=False)
