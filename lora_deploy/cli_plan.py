"""`lora-deploy plan`: where to adapt, and with which rank."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lora_deploy.cli_adapter import Json, Quiet
from lora_deploy.errors import UsageError
from lora_deploy.terminal import make_console, print_json, show_progress

__all__ = ["plan"]

# What only a study knows; said without --run, it would be left out without a word.
_OF_THE_STUDY = (
    "data", "held_out", "held_out_fraction", "output", "seeds", "only", "answers", "learning_rate", "alpha", "rslora",
    "steps", "schedule", "no_chat_template", "jobs", "overwrite",
)  # fmt: skip


def plan(
    context: typer.Context,
    model: Annotated[str, typer.Option("--model", help="The base: a directory or a hub id; no weights are needed.")],
    budget: Annotated[str, typer.Option("--budget", help="Trainable parameters: 921600, 450k, 18M.")],
    run: Annotated[bool, typer.Option("--run", help="Train the choices on --data and compare them.")] = False,
    data: Annotated[Path | None, typer.Option(help="JSONL, as train takes it.")] = None,
    held_out: Annotated[Path | None, typer.Option(help="JSONL to judge on. [default: a part of the data]")] = None,
    held_out_fraction: Annotated[float, typer.Option(help="That part.")] = 0.1,
    output: Annotated[Path | None, typer.Option("--output", help="Directory of the study.")] = None,
    seeds: Annotated[str, typer.Option(help="Each choice is trained with each.")] = "0,1,2",
    learning_rate: Annotated[
        str, typer.Option(help="One, or several, of which each choice gets the one that is best for it.")
    ] = "2e-4",
    only: Annotated[str, typer.Option(help="Choices to train, separated by commas. [default: all]")] = "",
    answers: Annotated[int, typer.Option(help="Held-out prompts that are answered greedily.")] = 40,
    alpha: Annotated[float, typer.Option(help="The update is scaled by alpha / rank, alpha the same for all.")] = 16,
    rslora: Annotated[bool, typer.Option("--rslora", help="Scale by alpha / sqrt(rank).")] = False,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps. [default: one pass over the data]")] = None,
    schedule: Annotated[str, typer.Option(help="linear, cosine or constant, after the warmup.")] = "linear",
    batch_size: Annotated[int, typer.Option(help="Rows of a step.")] = 4,
    max_length: Annotated[
        int | None, typer.Option(help="Tokens in a row. [default: 1024, or the model's limit]")
    ] = None,
    no_chat_template: Annotated[
        bool, typer.Option("--no-chat-template", help="Take prompt and completion as they are.")
    ] = False,
    quantization: Annotated[
        str | None, typer.Option(help="nf4, fp4, int8 or none. [default: nf4, or what the checkpoint is]")
    ] = None,
    no_double_quant: Annotated[bool, typer.Option("--no-double-quant", help="Leave the absmax values alone.")] = False,
    blocksize: Annotated[int, typer.Option(help="Weights that share one absmax (nf4, fp4).")] = 64,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    jobs: Annotated[int, typer.Option(help="Runs at the same time.")] = 1,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace another study in the output.")] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Where to adapt, and with which rank: what spends the same number of parameters, and what it costs.

    With --run: what it learns, too. A study that was interrupted goes on with the same command.
    """
    values = dict(context.params)
    _check_use(context, values)
    from lora_deploy.planning.budget import parse_budget

    count = parse_budget(budget)
    console = make_console(quiet, as_json)
    from lora_deploy.planning import make_plan
    from lora_deploy.planning.options import StudyOptions

    asked = StudyOptions(**_study_options(values))
    with show_progress(console) as on_progress:
        found = make_plan(
            model,
            count,
            scheme=asked.training(["x"], 1, 1e-3, 0, asked.data, asked.output).scheme(),
            batch_size=batch_size,
            max_length=max_length,
            device=device,
            memory=not run,  # whoever trains will see, and waits long enough
            on_progress=on_progress,
        )
    console.print(found.table())
    for note in found.notes():
        console.print(note, soft_wrap=True, markup=False)
    for warning in found.warnings:
        console.print(f"warning: {warning}", style="yellow", soft_wrap=True, markup=False)
    if not run:
        if as_json:
            print_json(found.values())
        return
    from lora_deploy.planning.study import run_study

    with show_progress(console) as on_progress:
        study = run_study(found, asked, on_progress=on_progress)
    console.print(study.table())
    for row in study.rows:
        for error in row.errors:
            console.print(f"{row.name} failed: {error}", style="red", soft_wrap=True, markup=False)
    for words in (study.summary(), *study.notes()):
        console.print(words, soft_wrap=True, markup=False)
    console.print(f"numbers, picture and adapters are in {output}", soft_wrap=True, markup=False)
    if as_json:
        print_json(study.model_dump(mode="json"))


def _check_use(context: typer.Context, values: dict[str, Any]) -> None:
    """Whether what is asked for with and without --run fits."""
    if not values["run"]:
        given = [
            name for name in _OF_THE_STUDY if getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"
        ]
        if given:
            raise UsageError(
                "these options are of a study, and nothing is trained without --run",
                found=", ".join(f"--{name.replace('_', '-')}" for name in given),
                remedy="add --run, or leave them out",
            )
        return
    for name in ("data", "output"):
        if values[name] is None:
            raise UsageError(f"a study needs --{name}", remedy=f"give --{name}, or leave --run out")


def _study_options(values: dict[str, Any]) -> dict[str, Any]:
    """The options of `StudyOptions`; a listing has neither data nor output."""
    kept = (
        "model",
        "held_out",
        "held_out_fraction",
        "answers",
        "alpha",
        "steps",
        "batch_size",
        "max_length",
        "schedule",
    )
    options = {name: values[name] for name in (*kept, "quantization", "blocksize", "device", "jobs", "overwrite")}
    return options | {
        "data": values["data"] or Path("data"),
        "output": values["output"] or Path("output"),
        "seeds": _split(values["seeds"], int, "--seeds"),
        "learning_rates": _split(values["learning_rate"], float, "--learning-rate"),
        "only": _split(values["only"], str, "--only"),
        "double_quant": not values["no_double_quant"],
        "use_rslora": values["rslora"],
        "chat_template": not values["no_chat_template"],
    }


def _split(text: str, kind: type, option: str) -> tuple[Any, ...]:
    try:
        return tuple(kind(part.strip()) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise UsageError(
            "a list holds something else than numbers", found=f"{option} {text}", expected="numbers and commas"
        ) from error
