"""A base, an adapter and an output that a test may damage, and the command that exports them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.commands import Command, Ended, command
from tests.conftest import CheckpointFactory
from tests.export.conftest import adapter_dir, branch_export, tiny_export

__all__ = ["Place", "adapter_dir", "branch_export", "command", "place", "tiny_export"]


class Place(NamedTuple):
    """A directory with everything that an export reads and writes."""

    root: Path
    base: Path
    adapter: Path
    output: Path
    command: Command

    def export(self, *more: object, quantization: str | None = "nf4") -> Ended:
        """Export the adapter, merged; later arguments win."""
        asked = ("--model", self.base, "--adapter", self.adapter, "--output", self.output, "--merge", "--quiet")
        method = ("--quantization", quantization) if quantization else ()
        return self.command("export", *asked, *method, *more)


@pytest.fixture
def place(
    checkpoint_dir: CheckpointFactory, adapter_dir: Callable[..., Path], command: Command, tmp_path: Path
) -> Place:
    """Copies of a dense Llama and its adapter, and a place for the output."""
    root = tmp_path / "place"
    base = Path(shutil.copytree(checkpoint_dir("llama"), root / "base"))
    adapter = Path(shutil.copytree(adapter_dir("llama"), root / "adapter"))
    return Place(root, base, adapter, root / "out", command)
