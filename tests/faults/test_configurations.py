"""Every field of a configuration with absurd values: planned or refused in little memory, nothing else raised."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.classifiers import save_classifier
from tests.conftest import save_tiny
from tests.encoder_decoders import save_t5
from tests.faults.configurations import REFUSED, changes, plan_each
from tests.faults.tally import Tally

_FAMILIES = ["llama", "gpt2", "qwen2", "bert", "t5"]


def _save(family: str, directory: Path) -> None:
    directory.mkdir()
    if family == "t5":
        save_t5("tied", directory)
    elif family == "bert":
        save_classifier(family, directory)
    else:
        save_tiny(family, "none", directory)


@pytest.mark.parametrize(
    ("family", "whole"),
    [(family, False) for family in _FAMILIES]
    + [pytest.param(family, True, marks=pytest.mark.slow) for family in ("llama", "gpt2", "qwen2")],
)
def test_an_absurd_configuration_is_planned_or_refused(family: str, whole: bool, tmp_path: Path, tally: Tally) -> None:
    base = tmp_path / "base"
    _save(family, base)
    asked = list(changes(json.loads((base / "config.json").read_text())))
    found = dict(zip(map(str, asked), plan_each(base, asked, whole=whole), strict=True))
    for one in found.values():
        tally("absurd configuration", one in ("planned", REFUSED))
    assert {change: one for change, one in found.items() if one not in ("planned", REFUSED)} == {}
    assert REFUSED in found.values()
