"""What the command line leaves out of transformers and torch, and that nothing misses it."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lora_deploy.export import export_onnx
from lora_deploy.light_imports import light_imports
from tests.commands import tree
from tests.conftest import CheckpointFactory
from tests.export.conftest import adapter_dir

__all__ = ["adapter_dir"]

_HEAVY = ("torch._dynamo.convert_frame", "torch._inductor", "torch.distributed.tensor", "torch.onnx")


def _run(code: str, *arguments: object) -> str:
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.strip()


_EXPORT = f"""
import sys
from lora_deploy.cli import main
try:
    main()
except SystemExit as ended:
    assert not ended.code, ended.code
print([name for name in {_HEAVY} if name in sys.modules])
"""


@pytest.mark.parametrize(("graph", "heavy"), [("mobius", False), pytest.param("traced", True, marks=pytest.mark.slow)])
def test_an_export_is_the_same_without_the_compiler(
    graph: str, heavy: bool, checkpoint_dir: CheckpointFactory, adapter_dir: Callable[..., Path], tmp_path: Path
) -> None:
    base, adapter = checkpoint_dir("llama"), adapter_dir("llama")
    asked = ["export", "--merge", "--model", base, "--adapter", adapter, "--quantization", "nf4", "--graph", graph]
    found = _run(_EXPORT, *asked, "--output", tmp_path / "light", "--no-verify", "--quiet").splitlines()[-1]
    assert (found != "[]") == heavy  # tracing is the compiler's
    whole = export_onnx(base, adapter, output=tmp_path / "whole", quantization="nf4", graph=graph, verify=False)
    assert tree(tmp_path / "light") == tree(whole.output)


def test_the_check_is_the_same(
    checkpoint_dir: CheckpointFactory, adapter_dir: Callable[..., Path], tmp_path: Path
) -> None:
    base, adapter = checkpoint_dir("llama"), adapter_dir("llama")
    asked = ["export", "--merge", "--model", base, "--adapter", adapter, "--quantization", "nf4", "--quiet"]
    _run(_EXPORT, *asked, "--output", tmp_path / "light")
    whole = export_onnx(base, adapter, output=tmp_path / "whole", quantization="nf4")
    assert tree(tmp_path / "light") == tree(whole.output)  # parity.json holds every number of it


def test_the_compiler_is_there_for_whoever_asks() -> None:
    found = _run("""
import gc, torch
from lora_deploy.light_imports import light_imports
with light_imports():
    assert not gc.isenabled()
    import transformers.modeling_utils
assert gc.isenabled()
from transformers.masking_utils import TransformGetItemToIndex
compiled = torch.compile(lambda x: x + 1, backend="eager")
with TransformGetItemToIndex():
    pass
print(compiled(torch.ones(())).item(), torch._dynamo.__file__ is not None, torch.distributed.is_available())
""")
    assert found == "2.0 True True"


@pytest.mark.parametrize(
    "asked",
    [
        "torch._dynamo.config.verbose",
        pytest.param("import torch._dynamo.utils", marks=pytest.mark.slow),
        pytest.param("torch._dynamo.reset()", marks=pytest.mark.slow),
    ],
)
def test_a_part_of_the_compiler_is_the_real_one(asked: str) -> None:
    found = _run(f"""
import torch
from lora_deploy.light_imports import light_imports
with light_imports():
    pass
import torch._dynamo
first = torch._dynamo
{asked}
import sys, torch._dynamo
print(first is torch._dynamo, torch._dynamo is sys.modules["torch._dynamo"], len(torch._dynamo.__path__))
""")
    assert found == "False True 1"


def test_what_was_imported_before_stays_as_it_is() -> None:
    import transformers.utils

    before = transformers.utils.is_torch_distributed_available(), gc.isenabled(), gc.get_freeze_count()
    with light_imports():
        assert gc.isenabled() == before[1]
    assert (transformers.utils.is_torch_distributed_available(), gc.isenabled(), gc.get_freeze_count()) == before
