"""The tokenizer of SmolLM2-135M-Instruct, as it is and as a rebuilt one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.real.conftest import Trained
from tests.tokenizer.same import assert_same

pytestmark = pytest.mark.real


@pytest.mark.parametrize("name", ["TokenizersBackend", "GPT2Tokenizer"])
def test_the_same_as_transformers(name: str, trained: Trained, tmp_path: Path) -> None:
    for file in trained.base.glob("*.json*"):
        shutil.copy(file, tmp_path)
    shutil.copy(trained.base / "chat_template.jinja", tmp_path)
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tokenizer_class": name}))
    assert_same(tmp_path)
