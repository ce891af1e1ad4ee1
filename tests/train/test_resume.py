"""A run that is interrupted and resumed ends with the bytes of the run that was not."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lora_deploy.config import LoraConfig
from lora_deploy.errors import CheckpointError, UsageError
from lora_deploy.train import TrainOptions, train_adapter
from lora_deploy.train.trainer import AdapterTrainer
from tests.train.conftest import calls, write_jsonl

MakeOptions = Callable[..., TrainOptions]
ADAPTER = "adapter_model.safetensors"


def cut_back(output: Path, step: int) -> None:
    """Leave what a run that broke off right after the checkpoint at `step` leaves."""
    for path in output.iterdir():
        if path.name != "checkpoints":
            path.unlink()
    for path in (output / "checkpoints").iterdir():
        if int(path.name.rpartition("-")[2]) > step:
            shutil.rmtree(path)


def log_of(output: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (output / "training_log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "tokens_per_second"} for line in lines]


# 10 rows, 2 a batch, 2 batches a step: an epoch is 3 steps, and its last step has one batch.
@pytest.mark.parametrize("step", [2, pytest.param(3, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("schedule", ["cosine"])
def test_a_resumed_run_is_the_same_bit_for_bit(options: MakeOptions, step: int, schedule: str) -> None:
    straight = options(schedule=schedule, eval_fraction=0.0)
    train_adapter(straight)
    expected, log = (straight.output / ADAPTER).read_bytes(), log_of(straight.output)
    cut_back(straight.output, step)
    result = train_adapter(options(schedule=schedule, resume=True))
    assert result.steps == 6
    assert (straight.output / ADAPTER).read_bytes() == expected
    assert log_of(straight.output) == log


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["q_proj"], "trainable_token_indices": [5, 9, 2], "lora_bias": True, "bias": "all"},
        {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True, "modules_to_save": ["norm"]},
    ],
    ids=["tokens and biases", "DoRA, embedding, whole modules"],
)
def test_whatever_is_trained_is_resumed(options: MakeOptions, config: dict[str, Any]) -> None:
    lora = LoraConfig(r=3, lora_alpha=7, lora_dropout=0.1, **config)
    straight = options(lora=lora, max_steps=4)
    train_adapter(straight)
    expected = (straight.output / ADAPTER).read_bytes()
    cut_back(straight.output, 2)
    train_adapter(options(lora=lora, max_steps=4, resume=True))
    assert (straight.output / ADAPTER).read_bytes() == expected


@pytest.mark.parametrize("lost", ["rng_state.pth", "optimizer.pt"])
def test_the_bits_depend_on_the_whole_checkpoint(options: MakeOptions, lost: str) -> None:
    straight = options(max_steps=4)
    train_adapter(straight)
    expected = (straight.output / ADAPTER).read_bytes()
    cut_back(straight.output, 2)
    (straight.output / "checkpoints" / "checkpoint-2" / lost).unlink()
    train_adapter(options(max_steps=4, resume=True))
    assert (straight.output / ADAPTER).read_bytes() != expected


@pytest.mark.parametrize(
    "left",
    [
        pytest.param(None, id="no state", marks=pytest.mark.slow),
        pytest.param(0, id="an empty one", marks=pytest.mark.slow),
        pytest.param(100, id="half of it"),
    ],
)
def test_a_broken_checkpoint_is_passed_over(options: MakeOptions, left: int | None) -> None:
    straight = options(max_steps=4)
    train_adapter(straight)
    expected = (straight.output / ADAPTER).read_bytes()
    cut_back(straight.output, 3)
    state = straight.output / "checkpoints" / "checkpoint-3" / "trainer_state.json"
    if left is None:
        state.unlink()
    else:
        os.truncate(state, left)
    train_adapter(options(max_steps=4, resume=True))
    assert (straight.output / ADAPTER).read_bytes() == expected


def test_a_finished_run_is_only_written_again(options: MakeOptions) -> None:
    straight = options(max_steps=2)
    train_adapter(straight)
    expected = (straight.output / ADAPTER).read_bytes()
    cut_back(straight.output, 2)
    result = train_adapter(options(max_steps=2, resume=True))
    assert (straight.output / ADAPTER).read_bytes() == expected
    assert (result.steps, result.tokens_per_second) == (2, None)
    assert result.loss is not None


@pytest.mark.parametrize(
    ("change", "name"),
    [({"learning_rate": 1e-3}, "learning_rate"), ({"max_steps": 9}, "max_steps"), ({"seed": 3}, "seed")],
)
def test_other_options_are_refused(options: MakeOptions, change: dict[str, Any], name: str) -> None:
    train_adapter(options(max_steps=2))
    with pytest.raises(UsageError, match="only be resumed with the options") as caught:
        train_adapter(options(**({"max_steps": 2, "resume": True} | change)))
    assert caught.value.details["found"].startswith(name)


def test_other_data_and_another_base_are_refused(
    options: MakeOptions, tmp_path: Path, own_checkpoint: Callable[..., Path], tiny_base: Callable[..., str]
) -> None:
    train_adapter(options(max_steps=2))
    with pytest.raises(UsageError, match="only be resumed") as caught:
        train_adapter(options(max_steps=2, resume=True, data=write_jsonl(tmp_path / "other.jsonl", calls(8))))
    assert caught.value.details["found"].startswith("data_sha256")
    other = own_checkpoint("llama", seed=5)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(Path(tiny_base()) / file, other)
    with pytest.raises(CheckpointError, match="not the one that the interrupted run") as refused:
        train_adapter(options(max_steps=2, resume=True, model=str(other)))
    assert refused.value.details["tensor"] == "base_sha256"


def test_ctrl_c_saves_after_the_step_and_can_be_resumed(
    options: MakeOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = options(save_steps=100)
    train_adapter(straight)
    step = AdapterTrainer.training_step

    def interrupted(self: AdapterTrainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 2:
            signal.raise_signal(signal.SIGINT)
        return step(self, *args, **kwargs)

    handler = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(AdapterTrainer, "training_step", interrupted)
    broken = options(save_steps=100, output=tmp_path / "broken")
    with pytest.raises(KeyboardInterrupt):
        train_adapter(broken)
    assert signal.getsignal(signal.SIGINT) is handler
    assert [path.name for path in (broken.output / "checkpoints").iterdir()] == ["checkpoint-3"]
    saved = (broken.output / "checkpoints" / "checkpoint-3" / ADAPTER).read_bytes()
    assert (broken.output / ADAPTER).read_bytes() == saved
    assert (broken.output / "lora_deploy.json").is_file()

    monkeypatch.undo()
    train_adapter(options(save_steps=100, output=broken.output, resume=True))
    assert (broken.output / ADAPTER).read_bytes() == (straight.output / ADAPTER).read_bytes()


@pytest.mark.slow
def test_a_signal_to_the_command_ends_it_with_130(options: MakeOptions, tmp_path: Path) -> None:
    asked = options(max_steps=150, save_steps=1000, output=tmp_path / "killed")
    command = [sys.executable, "-m", "lora_deploy", "train", "--model", asked.model, "--data", str(asked.data)]
    command += ["--output", str(asked.output), "--rank", "4", "--dropout", "0.2", "--batch-size", "2", "--max-steps"]
    command += ["150", "--gradient-accumulation", "2", "--save-steps", "1000", "--learning-rate", "0.01"]
    command += ["--device", "cpu"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        log = asked.output / "training_log.jsonl"
        until = time.monotonic() + 60
        while time.monotonic() < until and not (log.exists() and log.read_text().count("\n") > 2):
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "--resume" in out
    assert "Traceback" not in err
    (checkpoint,) = (asked.output / "checkpoints").iterdir()
    assert 2 <= int(checkpoint.name.rpartition("-")[2]) < 150

    train_adapter(asked.model_copy(update={"resume": True}))
    straight = asked.model_copy(update={"output": tmp_path / "straight"})
    train_adapter(straight)
    assert (asked.output / ADAPTER).read_bytes() == (straight.output / ADAPTER).read_bytes()
