"""`lora-deploy export --compare`: what each precision costs and keeps, in the place of an export."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import typer

from lora_deploy.errors import UsageError
from lora_deploy.inputs import check_inputs
from lora_deploy.terminal import make_console, print_json, show_progress

__all__ = ["export_comparison"]

# What says from what, on what and where; every other option says how to export.
_TAKEN = frozenset(
    {
        "adapter",
        "as_json",
        "calibration",
        "compare",
        "compare_on",
        "model",
        "no_double_quant",
        "output",
        "overwrite",
        "provider",
        "quantization",
        "quiet",
    }
)


def export_comparison(context: typer.Context, adapters: Mapping[str, str | Path]) -> None:
    """Compare the precisions, with the options of `export`.

    Args:
        context: Of the command.
        adapters: Directories by name.

    Raises:
        UsageError: Something is said of how to export, or there is not one adapter.
    """
    given = [
        name
        for name in context.params
        if name not in _TAKEN and getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"
    ]
    if given:
        raise UsageError(
            "a comparison tries the ways to export, so that none can be asked for",
            found=", ".join(f"--{name.replace('_', '-')}" for name in given),
            remedy="leave them out, or leave --compare out",
        )
    if len(adapters) != 1:
        raise UsageError(
            "a comparison is of one adapter", found=", ".join(adapters) or "none", remedy="give one --adapter"
        )
    asked = context.params
    check_inputs(asked["model"], adapters.values())
    console = make_console(asked["quiet"], asked["as_json"])
    with show_progress(console) as on_progress:
        from lora_deploy.compare import compare_precisions

        found = compare_precisions(
            asked["model"],
            next(iter(adapters.values())),
            output=asked["output"],
            data=asked["compare_on"],
            calibration=asked["calibration"],
            quantization=asked["quantization"],
            double_quant=not asked["no_double_quant"],
            provider=asked["provider"],
            overwrite=asked["overwrite"],
            on_progress=on_progress,
        )
    console.print(found.table())
    for row in found.rows:
        if row.error is not None:
            console.print(f"{row.name} failed: {row.error}", style="red", soft_wrap=True, markup=False)
    for warning in found.warnings:
        console.print(f"warning: {warning}", style="yellow", soft_wrap=True, markup=False)
    console.print(found.summary(), soft_wrap=True, markup=False)
    if found.measured:
        yardstick = found.measured[0].name
        console.print(f"speed is a multiple of that of {yardstick}, in turns; tokens/s say little on a busy machine")
    console.print(f"numbers and pictures are in {asked['output']}; open its report.html", soft_wrap=True, markup=False)
    if asked["as_json"]:
        print_json(found.model_dump())
