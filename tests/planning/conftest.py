"""A tiny base with a tokenizer, data, and a study of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lora_deploy.planning import Plan, make_plan
from lora_deploy.planning.options import StudyOptions
from tests.commands import command
from tests.train.conftest import _one_thread, calls, tiny_base, write_jsonl

__all__ = ["_one_thread", "command", "tiny_base"]

BUDGET = 1_952  # all-linear at rank 1

MakeStudy = Callable[..., StudyOptions]


@pytest.fixture
def plan(tiny_base: Callable[..., str]) -> Plan:
    """Of the tiny base, without the memory."""
    return make_plan(tiny_base(), BUDGET, memory=False)


@pytest.fixture
def options(tiny_base: Callable[..., str], tmp_path: Path) -> MakeStudy:
    """`options(**changes)`: of a study of two choices, two seeds and two learning rates."""
    data = write_jsonl(tmp_path / "data.jsonl", calls(12))

    def make(**changes: Any) -> StudyOptions:
        values: dict[str, Any] = {
            "model": tiny_base(),
            "data": data,
            "output": tmp_path / "study",
            "quantization": "none",
            "held_out_fraction": 0.25,
            "only": ("q_proj", "all-linear"),
            "seeds": (0, 1),
            "learning_rates": (1e-3, 1e-2),
            "steps": 2,
            "batch_size": 2,
            "device": "cpu",
        }
        return StudyOptions(**(values | changes))

    return make
