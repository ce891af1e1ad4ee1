"""`lora-deploy plan`: what it prints, and what it refuses with which code."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.commands import Command, assert_one_message
from tests.conftest import CheckpointFactory
from tests.planning.conftest import BUDGET, MakeStudy

TinyBase = Callable[..., str]


@pytest.fixture
def asked(tiny_base: TinyBase) -> list[object]:
    """Arguments of a listing that is fast."""
    return ["plan", "--model", tiny_base(), "--budget", BUDGET, "--batch-size", 1, "--max-length", 8]


def test_the_listing_says_what_each_choice_costs(asked: list[object], command: Command) -> None:
    ended = command(*asked, "--json")
    assert ended.code == 0
    printed = json.loads(ended.out)
    rows = {row["name"]: row for row in printed["choices"]}
    assert printed["budget"] == BUDGET
    assert rows["all-linear"]["parameters"] == BUDGET
    assert rows["all-linear"]["layers"] == 14
    assert rows["q_proj"]["rank"] == 8
    assert rows["q_proj"]["target_modules"] == ["q_proj"]
    for row in rows.values():
        assert row["deviation"] == pytest.approx(row["parameters"] / BUDGET - 1)
        assert row["adapter_bytes"] > 4 * row["parameters"]
        assert row["memory"]["adapter"] == 16 * row["parameters"]
        assert row["memory"]["activations"] > 0
        assert row["branch"]["multiply_adds"] >= row["parameters"]
    assert printed["warnings"] == []


def test_the_listing_needs_no_weights_and_fits_the_screen(
    own_checkpoint: CheckpointFactory, command: Command, asked: list[object]
) -> None:
    directory = own_checkpoint("llama")
    for file in directory.iterdir():
        if file.name != "config.json":
            file.unlink()
    asked[2] = directory
    shown = command(*asked)
    assert shown.code == 0
    for text in ("q_proj+v_proj", "1,952", "nf4, block 64", "train MB", "an estimate", "--merge adds nothing"):
        assert text in shown.out
    assert "…" not in shown.out


def test_a_quantized_checkpoint_is_what_it_is(checkpoint_dir: CheckpointFactory, command: Command) -> None:
    asked = ["plan", "--model", checkpoint_dir("llama", "int8"), "--budget", BUDGET, "--max-length", 8]
    assert json.loads(command(*asked, "--json").out)["quantization"] == "int8"
    assert command(*asked, "--quiet") == (0, "", "")
    assert_one_message(command(*asked, "--quantization", "nf4", "--quiet"), 3, "quantized already", "int8", "nf4")


@pytest.mark.parametrize(
    ("change", "code", "named"),
    [
        ({"--budget": "many"}, 2, ("no number of parameters", "many", "18M")),
        ({"--budget": "3"}, 2, ("no choice spends the budget", "3 parameters", "--budget")),
        ({"--model": "./nowhere"}, 3, ("nowhere", "config.json")),
        ({"--max-length": 999}, 2, ("--max-length", "999", "128")),
        ({"--quantization": "nf5"}, 2, ("quantization", "nf5")),
        ({"--seeds": "0,x"}, 2, ("--run",)),
        ({"--data": "data.jsonl"}, 2, ("--data", "--run")),
    ],
)
def test_what_cannot_be_is_refused_with_one_message(
    change: dict[str, object], code: int, named: tuple[str, ...], asked: list[object], command: Command
) -> None:
    arguments = list(asked)
    for option, value in change.items():
        arguments += [option, value]  # the last one given counts
    assert_one_message(command(*arguments, "--quiet"), code, *named)


def test_a_damaged_configuration_is_refused_by_its_file(
    own_checkpoint: CheckpointFactory, command: Command, asked: list[object]
) -> None:
    directory = own_checkpoint("llama")
    asked[2] = directory
    (directory / "config.json").write_text("{")
    assert_one_message(command(*asked, "--quiet"), 3, directory / "config.json")
    (directory / "config.json").write_text('{"model_type": "no-such-model"}')
    assert_one_message(command(*asked, "--quiet"), 3, directory, "no-such-model")


def test_a_study_prints_its_table_and_is_json(asked: list[object], command: Command, options: MakeStudy) -> None:
    study = options()
    arguments = [*asked, "--max-length", 64, "--run", "--data", study.data, "--output", study.output]
    arguments += ["--only", "q_proj,all-linear", "--seeds", "0,1", "--steps", 1, "--quantization", "none"]
    ended = command(*arguments, "--json")
    assert ended.code == 0
    printed = json.loads(ended.out)
    assert printed == json.loads((study.output / "plan.json").read_text())
    assert [row["name"] for row in printed["rows"]] == ["q_proj", "all-linear"]
    assert printed["seeds"] == [0, 1]
    shown = command(*arguments)  # everything is there: nothing is trained again
    for text in ("2 seeds", "±", "base alone", "lowest held-out loss", "q_proj"):
        assert text in shown.out
    assert command(*arguments, "--quiet") == (0, "", "")


def test_a_study_says_what_it_lacks(asked: list[object], command: Command, tmp_path: Path) -> None:
    assert_one_message(command(*asked, "--run", "--quiet"), 2, "--data")
    assert_one_message(command(*asked, "--run", "--data", "d.jsonl", "--quiet"), 2, "--output")
    missing = [*asked, "--run", "--data", tmp_path / "d.jsonl", "--output", tmp_path / "out", "--quiet"]
    assert_one_message(command(*missing), 3, tmp_path / "d.jsonl")
    assert_one_message(command(*missing, "--seeds", "0,x"), 2, "--seeds 0,x")
    assert_one_message(command(*missing, "--seeds", "0,0"), 2, "twice")
    assert_one_message(command(*missing, "--learning-rate", ""), 2, "learning_rates")
    assert not (tmp_path / "out").exists()
