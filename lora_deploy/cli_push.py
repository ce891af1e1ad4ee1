"""`lora-deploy push`: an export or an adapter to the hub."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lora_deploy.cli_adapter import Json, Quiet
from lora_deploy.terminal import make_console, print_json

if TYPE_CHECKING:
    from rich.console import Console

    from lora_deploy.hub import Pushed

__all__ = ["PushOption", "push", "show_pushed"]

PushOption = Annotated[
    str | None, typer.Option("--push-to-hub", help="Push it to this repository of the hub.", metavar="USER/NAME")
]


def push(
    directory: Annotated[Path, typer.Argument(help="What export or train wrote.", metavar="DIR")],
    repo_id: Annotated[
        str, typer.Argument(help="The repository; it is made where it is not there.", metavar="USER/NAME")
    ],
    base_model: Annotated[
        str | None, typer.Option(help="The base's id on the hub. [default: as it was loaded]")
    ] = None,
    license: Annotated[str | None, typer.Option(help="As the hub names it. [default: the base's]")] = None,
    private: Annotated[bool, typer.Option("--private", help="Make it private, if it is made.")] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Push an export that passed, or an adapter, to the hub, with a model card."""
    from lora_deploy.hub import push_to_hub

    console = make_console(quiet, as_json)
    pushed = push_to_hub(directory, repo_id, base_model=base_model, license=license, private=private)
    show_pushed(console, pushed)
    if as_json:
        print_json(asdict(pushed))


def show_pushed(console: Console, pushed: Pushed) -> None:
    """What was sent where."""
    for warning in pushed.warnings:
        console.print(f"warning: {warning}", style="yellow", soft_wrap=True, markup=False)
    console.print(f"{len(pushed.files)} files pushed: {pushed.url}", soft_wrap=True, markup=False)
