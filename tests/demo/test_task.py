"""The demo's task: examples that can be checked, the same each time, and none of them seen in training."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from lora_deploy.demo.task import write_task

_DAYS = {
    "mon": "Monday",
    "tue": "Tuesday",
    "wed": "Wednesday",
    "thu": "Thursday",
    "fri": "Friday",
    "sat": "Saturday",
    "sun": "Sunday",
}


def _read(file: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """(train, held out)"""
    directory = tmp_path_factory.mktemp("task") / "new"
    file, held_out = write_task(directory, train=200, held_out=30)
    assert file == directory / "train.jsonl"
    assert _read(directory / "held_out.jsonl") == held_out
    return _read(file), held_out


Task = tuple[list[dict[str, str]], list[dict[str, str]]]


def test_there_are_as_many_examples_as_asked_for_and_none_is_in_both(task: Task) -> None:
    train, held_out = task
    assert (len(train), len(held_out)) == (200, 30)
    prompts = [example["prompt"] for example in train + held_out]
    assert len(set(prompts)) == 230


def test_every_answer_is_what_its_prompt_says(task: Task) -> None:
    """Read back from the prompt by another way than the one it was made."""
    for example in task[0] + task[1]:
        assert example.keys() == {"prompt", "completion"}
        prompt, answer = example["prompt"], json.loads(example["completion"])
        assert list(answer) == ["who", "task", "day", "time"]
        assert answer["who"] in prompt
        assert answer["task"] in prompt
        assert _DAYS[answer["day"]] in prompt
        clock = re.search(r"(\d+) (am|pm)", prompt)
        assert clock is not None
        assert answer["time"] == clock[0]
        assert 1 <= int(clock[1]) <= 12


def test_all_hours_days_and_forms_occur(task: Task) -> None:
    answers = [json.loads(example["completion"]) for example in task[0]]
    assert len({answer["time"] for answer in answers}) == 24
    assert {answer["day"] for answer in answers} == set(_DAYS)
    assert len({example["prompt"].split()[0] in ("Remind", "Please", "On") for example in task[0]}) == 2


def test_a_seed_decides_the_examples(tmp_path: Path) -> None:
    files = [write_task(tmp_path / name, seed=seed)[0].read_bytes() for name, seed in (("a", 0), ("b", 0), ("c", 1))]
    assert files[0] == files[1] != files[2]
