"""`optimum-cli export lora`: the command of lora-deploy, found by optimum in its own namespace."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import Any

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
from optimum.commands.export.base import ExportCommand


class LoraExportCommand(BaseOptimumCLICommand):
    """`lora-deploy export`, with its options, its help and its exit codes."""

    COMMAND = CommandInfo(name="lora", help="Export a LoRA or QLoRA adapter and its base to ONNX, as it was trained.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Leave every argument to lora-deploy, `--help` too."""

        def take_all(args: Any = None, namespace: Namespace | None = None, **_: Any) -> tuple[Namespace, list[str]]:
            taken = namespace or Namespace()
            taken.func, taken.arguments = parser.get_default("func"), list(args or ())
            return taken, []

        parser.parse_known_args = take_all  # type: ignore[method-assign]
        parser.parse_known_intermixed_args = take_all  # type: ignore[method-assign]

    def run(self) -> None:
        """Run the command, and end the process with its exit code."""
        from lora_deploy.cli import main  # here, for optimum imports this file for each of its own commands

        main("export", self.args.arguments, "optimum-cli export lora")


REGISTER_COMMANDS = [(LoraExportCommand, ExportCommand)]
