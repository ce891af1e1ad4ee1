"""`lora-deploy train`: arguments in, exit code out."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lora_deploy.adapter import read_adapter
from lora_deploy.cli import main
from lora_deploy.train import TrainOptions
from lora_deploy.train.loop import train_adapter


def call(monkeypatch: pytest.MonkeyPatch, asked: TrainOptions, *more: str) -> int:
    """Run the command in this process and give its exit code."""
    arguments = ["--model", asked.model, "--data", str(asked.data), "--output", str(asked.output), "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["lora-deploy", "train", *arguments, *more])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def test_the_options_of_the_command_reach_the_training(
    options: Callable[..., TrainOptions], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = options()
    flags = {"--rank": "4", "--dropout": "0.2", "--batch-size": "2", "--gradient-accumulation": "2"}
    flags |= {"--max-steps": "3", "--learning-rate": "0.01", "--target-modules": "q_proj, v_proj"}
    pairs = [part for flag in flags.items() for part in flag]
    assert call(monkeypatch, asked, *pairs, "--no-double-quant", "--no-chat-template", "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["steps"], printed["output"]) == (3, str(asked.output))
    same = options(
        max_steps=3,
        target_modules=["q_proj", "v_proj"],
        double_quant=False,
        chat_template=False,
        output=asked.output.with_name("same"),
    )
    train_adapter(same)
    adapters = [(one.output / "adapter_model.safetensors").read_bytes() for one in (asked, same)]
    assert adapters[0] == adapters[1]


def test_a_whole_configuration_is_trained(
    options: Callable[..., TrainOptions], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The file that PEFT writes: what has no option of its own is trained too."""
    asked = options()
    wanted = peft.LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=["q_proj", "down_proj"],
        use_rslora=True,
        modules_to_save=["norm"],
        trainable_token_indices=[2, 3],
        rank_pattern={"down_proj": 2},
    )
    wanted.save_pretrained(asked.output.with_name("wanted"))
    file = asked.output.with_name("wanted") / "adapter_config.json"
    assert call(monkeypatch, asked, "--max-steps", "2", "--quiet", "--lora-config", str(file)) == 0
    adapter = read_adapter(asked.output)
    assert adapter.config.base_model_name_or_path == asked.model
    assert {name.rpartition(".")[2]: update.A.shape[0] for name, update in adapter.updates.items()} == {
        "q_proj": 3,
        "down_proj": 2,
    }
    assert set(adapter.parameters) == {"model.norm.weight"} | {
        f"model.layers.{layer}.{norm}_layernorm.weight" for layer in range(2) for norm in ("input", "post_attention")
    }
    assert set(adapter.tables) == {"model.embed_tokens"}
    moved = adapter.tables["model.embed_tokens"].tensors()["token_adapter.trainable_tokens_delta"]
    own = load_file(Path(asked.model) / "model.safetensors")["model.embed_tokens.weight"]
    assert not torch.equal(moved, own[[2, 3]].float())
    with_peft = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(asked.model), asked.output)
    assert with_peft.peft_config["default"].use_rslora
    assert call(monkeypatch, asked, "--overwrite", "--quiet", "--lora-config", str(file), "--rank", "16") == 2
    error = capsys.readouterr().err
    assert "parts of it once more" in error
    assert "found:    rank" in error


def test_the_result_is_printed_and_quiet_prints_nothing(
    options: Callable[..., TrainOptions], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, options(), "--max-steps", "1") == 0
    shown = capsys.readouterr().out
    assert "parameters trained" in shown
    assert "1 steps, loss" in shown
    assert call(monkeypatch, options(), "--max-steps", "1", "--overwrite", "--quiet") == 0
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")


@pytest.mark.parametrize(
    ("change", "flags", "code", "message"),
    [
        ({"data": "missing.jsonl"}, [], 3, "missing.jsonl"),
        ({"model": "./nowhere"}, [], 3, "nowhere"),
        ({}, ["--rank", "0"], 2, "rank = 0"),
        ({}, ["--learning-rate", "1e38"], 2, "learning_rate = 1e+38"),
        ({}, ["--quantization", "q4"], 2, "quantization = 'q4'"),
        ({}, ["--resume"], 2, "no checkpoint to resume"),
        ({}, ["--target-modules", "q_prj"], 3, "q_proj"),
    ],
)
def test_a_mistake_ends_with_one_message_and_its_code(
    options: Callable[..., TrainOptions],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    change: dict[str, str],
    flags: list[str],
    code: int,
    message: str,
) -> None:
    assert call(monkeypatch, options(**change), "--quiet", *flags) == code
    captured = capsys.readouterr()
    assert captured.err.startswith("lora-deploy: ")
    assert message in captured.err
    assert "Traceback" not in captured.err


def test_a_second_run_into_the_same_output_ends_with_five(
    options: Callable[..., TrainOptions], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, options(), "--max-steps", "1", "--quiet") == 0
    assert call(monkeypatch, options(), "--max-steps", "1", "--quiet") == 5
    assert "--overwrite" in capsys.readouterr().err
