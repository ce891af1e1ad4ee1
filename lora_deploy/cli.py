"""The command line: arguments in, exit code out. The heavy parts are imported inside the commands."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lora_deploy.errors import LoraDeployError

if TYPE_CHECKING:
    from rich.console import Console

app = typer.Typer(
    name="lora-deploy",
    help="What you trained is what you deploy: QLoRA adapters from training to onnxruntime, with proof.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Quiet = Annotated[bool, typer.Option("--quiet", help="Print nothing but errors.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON, for scripts.")]


def main() -> None:
    """Run the command line and end the process with the exit code of the design.

    0 done; 1 a bug of ours; 2 usage; 3 bad or mismatched input; 4 parity failed; 5 could not write; 130 interrupted.
    """
    try:
        app(standalone_mode=True)
    except LoraDeployError as error:
        print(f"lora-deploy: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("lora-deploy: interrupted", file=sys.stderr)
        sys.exit(130)


def _console(quiet: bool = False, as_json: bool = False) -> Console:
    """Where progress and tables go: the screen, nowhere with --quiet, or stderr where stdout carries JSON."""
    from rich.console import Console

    return Console(quiet=quiet, stderr=as_json, highlight=False)


def _print_json(values: Any) -> None:
    print(json.dumps(values, indent=2, sort_keys=True, default=str))
