"""The training run: what it leaves, what it computes, what it refuses."""

from __future__ import annotations

import importlib.util
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from lora_deploy.adapter import TrainingRecord, load_adapter, read_adapter
from lora_deploy.config import LoraConfig
from lora_deploy.data.examples import load_examples
from lora_deploy.errors import CheckpointError, DataError, OutputError, UsageError
from lora_deploy.quantization import QuantizationScheme, load_base_model
from lora_deploy.quantization.base import TrainingBase
from lora_deploy.quantization.hashes import hash_codes
from lora_deploy.train import TrainOptions, train_adapter
from tests.train.conftest import calls, char_tokenizer, write_jsonl

MakeOptions = Callable[..., TrainOptions]


def log_of(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "training_log.jsonl").read_text().splitlines()]


def weights_of(output: Path) -> bytes:
    return (output / "adapter_model.safetensors").read_bytes()


def test_a_run_leaves_the_adapter_the_record_the_log_and_the_curve(options: MakeOptions) -> None:
    asked = options(max_steps=12, save_steps=5, keep_checkpoints=2, eval_fraction=0.2, eval_steps=4)
    screen = Console(record=True, width=120, file=io.StringIO())
    result = train_adapter(asked, console=screen)
    output = asked.output
    assert sorted(path.name for path in output.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "checkpoints",
        "lora_deploy.json",
        "loss.png",
        "training_log.jsonl",
    ]
    assert sorted(path.name for path in (output / "checkpoints").iterdir()) == ["checkpoint-10", "checkpoint-12"]
    config = LoraConfig.load(output)
    assert (config.r, config.lora_alpha, config.base_model_name_or_path) == (4, 32, asked.model)
    assert len(read_adapter(output).updates) == 14
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")

    log = log_of(output)
    steps = [line for line in log if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 13))
    assert [line["step"] for line in log if "eval_loss" in line] == [0, 4, 8, 12]
    assert all({"epoch", "learning_rate", "tokens_per_second"} <= line.keys() for line in steps)
    assert steps[-1]["loss"] < 0.5 * steps[0]["loss"]
    assert (result.steps, result.loss, result.eval_loss) == (12, steps[-1]["loss"], log[-1]["eval_loss"])
    assert (result.examples, result.eval_examples) == (8, 2)
    assert result.trainable_parameters == sum(
        one.A.numel() + one.B.numel() for one in read_adapter(output).updates.values()
    )
    shown = screen.export_text()
    assert "12/12" in shown
    assert "tokens/s" in shown


@pytest.mark.parametrize("quantization", [None, "fp4", "int8", "none"])
def test_the_record_tells_the_base_that_was_trained_on(
    options: MakeOptions, tiny_base: Callable[..., str], quantization: str | None
) -> None:
    asked = options(max_steps=2, quantization=quantization, double_quant=False)
    train_adapter(asked)
    record = TrainingRecord.load(asked.output)
    assert record is not None
    method = quantization or "nf4"
    assert record.quantization == QuantizationScheme(method=method, double_quant=method in ("int8", "none"))
    assert record.base_sha256 == TrainingBase(tiny_base()).sha256()
    if method == "none":
        assert record.codes_sha256 is None
    else:
        assert record.codes_sha256 == hash_codes(load_base_model(tiny_base(), record.quantization))
    assert all(bool(update.B.any()) for update in read_adapter(asked.output).updates.values())


@pytest.mark.parametrize("method", ["nf4", "int8"])
def test_a_checkpoint_that_is_quantized_is_trained_on_as_it_is(
    options: MakeOptions, tiny_base: Callable[..., str], method: str
) -> None:
    asked = options(model=tiny_base(method), max_steps=2)
    train_adapter(asked)
    record = TrainingRecord.load(asked.output)
    assert record is not None
    assert record.quantization.method == method
    with pytest.raises(CheckpointError, match="quantized already"):
        train_adapter(options(model=tiny_base(method), quantization="fp4", overwrite=True))


def test_accumulated_batches_weigh_each_token_the_same(options: MakeOptions) -> None:
    exact = {"dropout": 0.0, "max_steps": 2, "quantization": "none", "max_grad_norm": 0.0}
    whole = options(**exact, batch_size=4, gradient_accumulation=1)
    train_adapter(whole)
    parts = options(**exact, batch_size=1, gradient_accumulation=4, output=whole.output.with_name("parts"))
    train_adapter(parts)
    for one, other in zip(log_of(whole.output), log_of(parts.output), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)


def test_gradient_checkpointing_computes_the_same(options: MakeOptions) -> None:
    plain = options(max_steps=3)
    train_adapter(plain)
    saving = options(max_steps=3, gradient_checkpointing=True, output=plain.output.with_name("saving"))
    train_adapter(saving)
    assert weights_of(plain.output) == weights_of(saving.output)


def test_packing_trains_on_the_same_losses(options: MakeOptions) -> None:
    everything = {"dropout": 0.0, "max_steps": 2, "batch_size": 10, "gradient_accumulation": 1}
    plain = options(**everything)
    train_adapter(plain)
    packed = options(**everything, pack=True, max_length=100, output=plain.output.with_name("packed"))
    train_adapter(packed)
    for one, other in zip(log_of(plain.output), log_of(packed.output), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)


def test_the_evaluation_loss_is_the_mean_over_all_learned_tokens(
    options: MakeOptions, tiny_base: Callable[..., str], tmp_path: Path
) -> None:
    held = write_jsonl(tmp_path / "held.jsonl", calls(7))
    result = train_adapter(options(eval_data=held, max_steps=2, batch_size=2))
    model = load_adapter(load_base_model(tiny_base(), "nf4"), tmp_path / "out").eval()
    total, count = 0.0, 0
    for example in load_examples(held, char_tokenizer(), 100).kept:
        ids, labels = example.input_ids.long()[None], example.labels.long()[None]
        learned = int((labels != -100).sum())
        with torch.no_grad():
            total += float(model(input_ids=ids, labels=labels).loss) * learned
        count += learned
    assert result.eval_loss == pytest.approx(total / count, rel=1e-5)


def test_evaluating_does_not_change_the_training(options: MakeOptions, tmp_path: Path) -> None:
    plain = options()
    train_adapter(plain)
    held = write_jsonl(tmp_path / "held.jsonl", calls(3))
    judged = options(eval_data=held, eval_steps=1, output=tmp_path / "judged")
    train_adapter(judged)
    assert weights_of(plain.output) == weights_of(judged.output)


def test_another_seed_gives_another_adapter(options: MakeOptions, tmp_path: Path) -> None:
    train_adapter(options(max_steps=2))
    train_adapter(options(max_steps=2, output=tmp_path / "again"))
    train_adapter(options(max_steps=2, seed=1, output=tmp_path / "other"))
    assert weights_of(tmp_path / "out") == weights_of(tmp_path / "again") != weights_of(tmp_path / "other")


@pytest.mark.parametrize("name", ["adapter_config.json", "lora_deploy.json"])
def test_an_output_that_holds_a_run_is_refused_before_anything_is_read(options: MakeOptions, name: str) -> None:
    asked = options(model="./nowhere")
    asked.output.mkdir()
    (asked.output / name).write_text("{}")
    with pytest.raises(OutputError, match="holds a training run already") as caught:
        train_adapter(asked)
    assert "--overwrite" in caught.value.details["remedy"]
    with pytest.raises(CheckpointError, match="not a directory"):
        train_adapter(options(model="./nowhere", overwrite=True))


def test_overwriting_begins_anew(options: MakeOptions) -> None:
    train_adapter(options(max_steps=3))
    first = weights_of(options().output)
    train_adapter(options(max_steps=2, overwrite=True))
    assert weights_of(options().output) != first
    assert [line["step"] for line in log_of(options().output)] == [1, 2]
    assert not (options().output / "checkpoints" / "checkpoint-3").exists()


def test_a_model_without_a_tokenizer_is_named(options: MakeOptions, own_checkpoint: Callable[..., Path]) -> None:
    with pytest.raises(CheckpointError, match="tokenizer cannot be read"):
        train_adapter(options(model=str(own_checkpoint("llama"))))


def test_a_run_that_diverges_says_so(options: MakeOptions) -> None:
    with pytest.raises(UsageError, match="diverged"):
        train_adapter(options(learning_rate=1e30, max_grad_norm=0, quantization="none", warmup_ratio=0))
    assert not (options().output / "adapter_model.safetensors").exists()


def test_what_cannot_be_is_refused(options: MakeOptions) -> None:
    with pytest.raises(UsageError, match="not both"):
        options(resume=True, overwrite=True)
    with pytest.raises(UsageError, match="not both"):
        options(eval_fraction=0.5, eval_data="d.jsonl")
    with pytest.raises(UsageError, match="cannot have") as caught:
        options(rank=0)
    assert caught.value.details["found"] == "rank = 0"
    with pytest.raises(UsageError, match="more than the model takes"):
        train_adapter(options(max_length=4096))
    with pytest.raises(UsageError, match="need a GPU"):
        train_adapter(options(optimizer="paged_adamw_8bit"))
    with pytest.raises(UsageError, match="no checkpoint to resume"):
        train_adapter(options(resume=True))
    with pytest.raises(DataError, match="cannot be read"):
        train_adapter(options(data="missing.jsonl"))


@pytest.mark.parametrize("launcher", ["FSDP", "DEEPSPEED"])
def test_a_launcher_that_would_spread_the_parameters_is_refused(
    options: MakeOptions, monkeypatch: pytest.MonkeyPatch, launcher: str
) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{launcher}", "true")
    with pytest.raises(UsageError, match="does not spread the parameters") as caught:
        train_adapter(options())
    assert launcher in caught.value.details["found"]
    assert not options().output.exists()


@pytest.mark.parametrize("package", ["accelerate", "matplotlib"])
def test_a_missing_extra_is_named(options: MakeOptions, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == package else find(name, *a))
    with pytest.raises(UsageError, match=f"training needs {package}") as caught:
        train_adapter(options())
    assert caught.value.details["remedy"] == 'pip install "lora-deploy[train]"'
