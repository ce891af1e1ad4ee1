"""`optimum-cli export lora` is `lora-deploy export`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lora_deploy.adapter import write_adapter
from tests.commands import Command, command, tree
from tests.conftest import CheckpointFactory, random_adapter, tiny_model

__all__ = ["command"]

OPTIMUM = [sys.executable, "-c", "from optimum.commands.optimum_cli import main; main()", "export"]


def optimum(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run `optimum-cli export` in a process of its own."""
    return subprocess.run([*OPTIMUM, *map(str, arguments)], capture_output=True, text=True, timeout=300)


@pytest.fixture
def exported(checkpoint_dir: CheckpointFactory, tmp_path: Path) -> list[object]:
    """Arguments of an export of a tiny adapter."""
    write_adapter(random_adapter(tiny_model("llama"), target_modules=["q_proj", "v_proj"]), tmp_path / "adapter")
    return ["--model", checkpoint_dir("llama"), "--adapter", tmp_path / "adapter", "--quantization", "nf4"]


def test_the_files_are_those_of_lora_deploy(exported: list[object], tmp_path: Path, command: Command) -> None:
    run = optimum("lora", *exported, "--merge", "--precision", "int8", "--output", tmp_path / "theirs")
    assert (run.returncode, run.stderr) == (0, "")
    assert "must fail" in run.stdout
    assert command("export", *exported, "--merge", "--precision", "int8", "--output", tmp_path / "ours").code == 0
    ours, theirs = tree(tmp_path / "ours"), tree(tmp_path / "theirs")
    assert ours == theirs


def test_errors_have_their_message_and_exit_code(exported: list[object], tmp_path: Path) -> None:
    run = optimum("lora", *exported, "--output", tmp_path / "out")
    assert run.returncode == 2
    assert run.stderr.startswith("lora-deploy: say how the adapter is exported")
    assert "Traceback" not in run.stderr
    run = optimum("lora", "--model", tmp_path / "nowhere", "--merge", "--output", tmp_path / "out")
    assert (run.returncode, run.stderr.count("\n")) == (3, 3)
    assert not (tmp_path / "out").exists()


def test_help_is_found_where_optimum_has_it() -> None:
    assert "Export a LoRA or QLoRA adapter" in " ".join(optimum("--help").stdout.split())
    shown = optimum("lora", "--help").stdout
    assert "optimum-cli export lora" in shown
    assert "--precision" in shown


def test_optimum_is_not_made_a_package_of_ours() -> None:
    """Its folders belong to all that install into them (PEP 420)."""
    place = Path(__file__).parents[2] / "optimum"
    assert [path.name for path in place.rglob("*.py")] == ["register_lora.py"]
