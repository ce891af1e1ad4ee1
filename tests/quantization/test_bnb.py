"""bitsandbytes is imported without what torch's compiler needs, and what it compiles is compiled when it is called."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lora_deploy
from lora_deploy.quantization.bnb import compiled_when_called


def test_no_backend_of_the_compiler_is_loaded() -> None:
    program = "import sys, lora_deploy.quantization; print({0!r} in sys.modules, {1!r} in sys.modules)"
    names = ("bitsandbytes", "torch._inductor.compile_fx")
    ended = subprocess.run([sys.executable, "-c", program.format(*names)], capture_output=True, text=True, check=True)
    assert ended.stdout.split() == ["True", "False"]


def test_a_function_is_compiled_once_when_it_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []

    def compile_(model: object, **options: object) -> object:
        compiled.append((model, options))
        return model

    monkeypatch.setattr(torch, "compile", compile_)
    with compiled_when_called():

        @torch.compile
        def one(value: int) -> int:
            """Its own words."""
            return value + 1

        @torch.compile(dynamic=False)
        def two(value: int, *, by: int) -> int:
            return value * by

    assert torch.compile is compile_
    assert compiled == []
    assert (one(1), one(2), two(3, by=2)) == (2, 3, 6)
    assert [options for _, options in compiled] == [{}, {"dynamic": False}]
    assert one.__doc__ == "Its own words."


def test_the_compiler_is_back_after_an_error() -> None:
    before = torch.compile
    with pytest.raises(ZeroDivisionError), compiled_when_called():
        raise ZeroDivisionError
    assert torch.compile is before


def test_bitsandbytes_is_imported_in_one_file() -> None:
    package = Path(lora_deploy.__file__).parent
    found = set()
    for file in package.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            found |= {file.name for name in names if name.partition(".")[0] == "bitsandbytes"}
    assert found == {"bnb.py"}
