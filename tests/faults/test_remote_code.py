"""No code of a model's directory is run, whatever its configuration says, and no call in the package would allow it."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest

import lora_deploy
from tests.commands import assert_one_message
from tests.faults.conftest import Place

_LOADERS = ("from_pretrained", "from_config")
_AUTO_MAP = {
    "AutoConfig": "modeling_evil.EvilConfig",
    "AutoModelForCausalLM": "modeling_evil.EvilModel",
    "AutoTokenizer": ["modeling_evil.EvilTokenizer", None],
}


def _plant(place: Place, **more: Any) -> Path:
    """Put code beside the model that leaves a mark when it is imported, and say everywhere that it must be."""
    mark = place.root.parent / "mark"
    (place.base / "modeling_evil.py").write_text(f"open({str(mark)!r}, 'w').close()\n")
    file = place.base / "config.json"
    file.write_text(
        json.dumps(json.loads(file.read_text()) | {"auto_map": _AUTO_MAP, "trust_remote_code": True} | more)
    )
    (place.base / "tokenizer_config.json").write_text(json.dumps({"auto_map": _AUTO_MAP, "trust_remote_code": True}))
    return mark


@pytest.mark.parametrize("flags", [[], ["--no-verify"], ["--graph", "traced", "--no-verify"]])
def test_the_code_of_a_known_model_is_not_run(flags: list[str], place: Place) -> None:
    mark = _plant(place)
    assert place.export(*flags).code == 0
    assert not mark.exists()


def test_a_model_that_needs_its_own_code_is_refused(place: Place) -> None:
    mark = _plant(place, model_type="evil")
    assert_one_message(place.export(), 3, "config.json")
    assert not mark.exists()


def test_every_loader_says_that_no_code_is_trusted() -> None:
    found = 0
    for file in Path(lora_deploy.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            owner = node.func.value
            if node.func.attr not in _LOADERS or (isinstance(owner, ast.Name) and owner.id == "GenaiConfigGenerator"):
                continue
            said = {word.arg: word.value for word in node.keywords}.get("trust_remote_code")
            assert isinstance(said, ast.Constant), f"{file}:{node.lineno}"
            assert said.value is False, f"{file}:{node.lineno}"
            found += 1
    assert found > 10
