"""`lora-deploy run` needs neither torch nor transformers; onnx_ir only where weights are expanded."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lora_deploy.run import OnnxModel
from tests.run.test_generate import PROMPT, Talking

PROGRAM = """
import sys
from lora_deploy.cli import main
try:
    main()
except SystemExit as ended:
    assert not ended.code, ended.code
print("LOADED", *sorted({name.partition(".")[0] for name in sys.modules} & {"torch", "transformers", "onnx_ir"}))
"""


def run(directory: Path, *arguments: str) -> tuple[str, str]:
    """What the command prints in a process of its own, and which of the heavy libraries it has loaded then."""
    command = [sys.executable, "-c", PROGRAM, "run", str(directory), "--prompt", PROMPT, "--quiet", *arguments]
    ended = subprocess.run(
        [*command, "--max-new-tokens", "8"], capture_output=True, text=True, check=True, encoding="utf-8"
    )
    text, _, loaded = ended.stdout.rpartition("\nLOADED")
    return text, loaded.strip()


def test_a_merged_export(talking_export: Talking) -> None:
    _, export = talking_export()
    assert run(export) == (OnnxModel(export).generate(PROMPT, max_new_tokens=8), "")


@pytest.mark.parametrize(
    ("branch", "options"),
    [
        ("hot-swap", ["--adapter", "a"]),
        ("hot-swap", ["--adapter", "a=0.5", "--adapter", "b=1"]),
        ("pooled", ["--adapter", "b"]),
    ],
    ids=str,
)
def test_a_branch(branch: str, options: list[str], talking_branch: Callable[..., Path]) -> None:
    export = talking_branch(branch)
    adapter = options[-1] if len(options) == 2 else {"a": 0.5, "b": 1.0}
    expected = OnnxModel(export, adapter).generate(PROMPT, max_new_tokens=8)  # type: ignore[arg-type]
    assert run(export, *options) == (expected, "")


@pytest.mark.parametrize(("weights", "loaded"), [("expand", "onnx_ir"), ("native", "")])
def test_other_ways_to_run_weights(weights: str, loaded: str, talking_branch: Callable[..., Path]) -> None:
    export = talking_branch()
    expected = OnnxModel(export, "a", weights=weights).generate(PROMPT, max_new_tokens=8)  # type: ignore[arg-type]
    assert run(export, "--adapter", "a", "--weights", weights) == (expected, loaded)
