"""`lora-deploy adapter ...`: adapters for an export that is there."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lora_deploy.inputs import check_inputs
from lora_deploy.terminal import make_console, print_json

__all__ = ["Json", "Quiet", "adapter_app"]

adapter_app = typer.Typer(name="adapter", help="Adapters for an export that is there.", no_args_is_help=True)

Quiet = Annotated[bool, typer.Option("--quiet", help="Print nothing but errors.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON, for scripts.")]


@adapter_app.command("convert")
def convert(
    adapter: Annotated[Path, typer.Argument(help="Directory of the adapter, in PEFT's format.", metavar="ADAPTER")],
    directory: Annotated[Path, typer.Option("--export", help="What export --branch wrote.", metavar="OUT")],
    name: Annotated[str | None, typer.Option(help="Of the adapter. [default: its directory's]")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an adapter of this name.")] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Make an adapter available in an export that is there, without rebuilding it."""
    check_inputs(adapters=[adapter])
    from lora_deploy.export.onnx_adapter import convert_adapter

    file = convert_adapter(adapter, directory, name, overwrite=overwrite)
    size = file.stat().st_size
    make_console(quiet, as_json).print(f"{size / 1e6:,.1f} MB in {file}", soft_wrap=True, markup=False)
    if as_json:
        print_json({"file": file, "bytes": size})


@adapter_app.command("inspect")
def inspect(
    adapter: Annotated[Path, typer.Argument(help="A directory in PEFT's format, or an .onnx_adapter.")],
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Show what an adapter changes: targets, ranks, norms, size."""
    if adapter.is_dir():
        check_inputs(adapters=[adapter])
    from lora_deploy.export.inspect import describe_adapter

    description = describe_adapter(adapter)
    console = make_console(quiet, as_json)
    console.print(description.table())
    console.print(description.summary(), soft_wrap=True, markup=False)
    if as_json:
        print_json(description.model_dump())
