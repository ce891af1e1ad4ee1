"""`lora-deploy bench`: how fast an export runs here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lora_deploy.cli_adapter import Quiet
from lora_deploy.cli_run import HowWeights
from lora_deploy.errors import UsageError
from lora_deploy.terminal import make_console, print_json, show_progress

__all__ = ["bench"]

_STDOUT = Path("-")


def bench(
    context: typer.Context,
    directory: Annotated[Path, typer.Argument(help="What export wrote.", metavar="OUT")],
    prompt_tokens: Annotated[
        int | None, typer.Option(help="Tokens of the prompt, or of a text to classify. [default: 128, if they fit]")
    ] = None,
    tokens: Annotated[int | None, typer.Option(help="Tokens to decode after it. [default: 64, if they fit]")] = None,
    runs: Annotated[int, typer.Option(help="How often everything is measured, each time in a new process.")] = 5,
    adapter: Annotated[
        list[str] | None,
        typer.Option("--adapter", help="Run with it; several to switch or mix. [default: all]", metavar="NAME"),
    ] = None,
    weights: HowWeights = "stored",
    provider: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Annotated[int | None, typer.Option(help="Threads of onnxruntime. [default: as `run` does]")] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write all of it as JSON; - for the screen.", metavar="FILE")
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Measure an export: time to open, first token, prompt, decoding, adapters, memory. A classifier: texts."""
    from lora_deploy.bench import BenchOptions, run_benchmark
    from lora_deploy.run.classify import exported_task
    from lora_deploy.task import is_classification

    given = getattr(context.get_parameter_source("tokens"), "name", "") == "COMMANDLINE"
    if given and is_classification(exported_task(directory)):
        raise UsageError("this export is a classifier: it decodes no tokens", found="--tokens", remedy="leave it out")
    options = BenchOptions(
        directory=directory,
        prompt_tokens=prompt_tokens,
        tokens=tokens,
        runs=runs,
        adapters=tuple(adapter or ()),
        provider=provider,
        weights=weights,
        threads=threads,
    )
    console = make_console(quiet, as_json=json_file == _STDOUT)
    with show_progress(console) as on_progress:
        found = run_benchmark(options, on_progress)
    if json_file == _STDOUT:
        print_json(found.model_dump(mode="json"))
    elif json_file is not None:
        found.save(json_file)
    console.print(found.table())
    for note in found.notes():
        console.print(note, soft_wrap=True, markup=False)
