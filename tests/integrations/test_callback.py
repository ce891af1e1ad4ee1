"""The export at the end of a training by transformers' Trainer and by TRL's, of PEFT's layers and ours."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import accelerate
import peft
import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from lora_deploy import LoraConfig, get_lora_model
from lora_deploy.adapter import read_adapter
from lora_deploy.errors import AdapterError, CheckpointError, DataError, OutputError, ParityError, UsageError
from lora_deploy.integrations import ExportCallback, save_trained
from lora_deploy.integrations.spread import will_be_spread
from lora_deploy.quantization.model import keep_codes
from lora_deploy.run import OnnxSession
from tests.commands import tree
from tests.conftest import (
    QUIET_PEFT,
    CheckpointFactory,
    load_quantized,
    logits,
    tiny_model,
    token_ids,
)
from tests.peft.models import move

pytestmark = QUIET_PEFT

SETTINGS = {"r": 4, "lora_alpha": 10, "target_modules": ["q_proj", "v_proj", "down_proj"], "init_lora_weights": True}


class Rows(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Eight rows of tokens."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = token_ids(1, 12, seed=index)[0]
        return {"input_ids": row, "labels": row}


def arguments(directory: Path, **options: Any) -> TrainingArguments:
    """Four steps that change every B."""
    settings: dict[str, Any] = {"learning_rate": 0.05, "per_device_train_batch_size": 2, "max_steps": 4}
    settings |= {"report_to": [], "save_strategy": "no", "use_cpu": True, "disable_tqdm": True, "warmup_steps": 0}
    return TrainingArguments(output_dir=str(directory), **(settings | options))


def train(model: nn.Module, callback: ExportCallback, directory: Path, **options: Any) -> Trainer:
    """Train it, with the callback."""
    trainer = Trainer(model=model, args=arguments(directory, **options), train_dataset=Rows(), callbacks=[callback])
    trainer.train()
    return trainer


def assert_exported(output: Path, model: nn.Module, tolerance: float = 1e-3) -> None:
    """What was exported computes what the model in memory does, and the base alone does not."""
    keep_codes(model.eval())  # bitsandbytes' own forward is another function on processors with AVX512
    ids = token_ids()
    expected = logits(model, ids)
    found, _ = OnnxSession(output).forward(ids.numpy(), torch.ones_like(ids).numpy())
    assert (torch.from_numpy(found) - expected).abs().max() < tolerance
    with model.disable_adapter():  # type: ignore[operator, union-attr]
        assert (logits(model, ids) - expected).abs().max() > 100 * tolerance


@pytest.mark.parametrize("method", ["none", "nf4", "fp4"])
def test_what_peft_trained_is_exported(
    method: str, checkpoint_dir: CheckpointFactory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = checkpoint_dir("llama")
    base = (
        load_quantized(place, method, double_quant=False)
        if method != "none"
        else type(tiny_model("llama")).from_pretrained(place, dtype=torch.float32)
    )
    model = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", **SETTINGS))
    callback = ExportCallback(tmp_path / "out")
    train(model, callback, tmp_path / "run")
    assert callback.result is not None
    assert callback.result.report is not None
    assert callback.result.report.passed
    assert_exported(tmp_path / "out", model)
    record = json.loads((tmp_path / "run" / "adapter" / "lora_deploy.json").read_text())
    assert record["quantization"]["method"] == method
    assert record["quantization"]["double_quant"] is (method == "none")
    assert record["base_model"] == str(place)
    assert not callback.result.warnings  # the codes are those of the training
    shown = capsys.readouterr().out
    assert "must fail" in shown
    assert str(tmp_path / "out") in shown.replace("\n", "")


def dense(place: Path, **settings: Any) -> peft.PeftModel:
    """PEFT's layers on the base of a checkpoint."""
    base = type(tiny_model("llama")).from_pretrained(place, dtype=torch.float32)
    return peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", **(SETTINGS | settings)))


def test_a_branch_of_an_adapter_with_a_name(checkpoint_dir: CheckpointFactory, tmp_path: Path) -> None:
    base = type(tiny_model("llama")).from_pretrained(checkpoint_dir("llama"), dtype=torch.float32)
    model = peft.get_peft_model(base, peft.LoraConfig(**SETTINGS), adapter_name="own")
    callback = ExportCallback(tmp_path / "out", adapter=tmp_path / "kept", merge=False, quiet=True)
    train(model, callback, tmp_path / "run", logging_steps=1)
    assert (tmp_path / "out" / "adapters" / "kept.onnx_adapter").is_file()
    trained = read_adapter(tmp_path / "kept").updates["model.layers.0.self_attn.q_proj"]
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    assert torch.equal(trained.B, layer.lora_B["own"].weight)
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "lora_deploy.json",
        "training_log.jsonl",
    ]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "kept, step 1: training loss" in page


def test_what_our_own_layers_trained_is_exported(checkpoint_dir: CheckpointFactory, tmp_path: Path) -> None:
    base = type(tiny_model("llama")).from_pretrained(checkpoint_dir("llama"), dtype=torch.float32)
    get_lora_model(base, LoraConfig(**SETTINGS))
    callback = ExportCallback(tmp_path / "out", quiet=True)
    train(base, callback, tmp_path / "run")
    ids = token_ids()
    found, _ = OnnxSession(tmp_path / "out").forward(ids.numpy(), torch.ones_like(ids).numpy())
    assert (torch.from_numpy(found) - logits(base.eval(), ids)).abs().max() < 1e-3
    assert (logits(tiny_model("llama"), ids) - logits(base, ids)).abs().max() > 0.1


def test_a_whole_head_and_trained_biases(checkpoint_dir: CheckpointFactory, tmp_path: Path) -> None:
    base = type(tiny_model("qwen2")).from_pretrained(checkpoint_dir("qwen2"), dtype=torch.float32)
    settings = SETTINGS | {"modules_to_save": ["lm_head"], "bias": "all"}
    model = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    train(model, ExportCallback(tmp_path / "out", quiet=True), tmp_path / "run")
    ids = token_ids()
    found, _ = OnnxSession(tmp_path / "out").forward(ids.numpy(), torch.ones_like(ids).numpy())
    assert (torch.from_numpy(found) - logits(model.eval(), ids)).abs().max() < 1e-3


def merged_first(place: Path) -> peft.PeftModel:
    """An adapter on a 4-bit base that another adapter was merged into."""
    first = peft.get_peft_model(load_quantized(place, "nf4"), peft.LoraConfig(task_type="CAUSAL_LM", **SETTINGS))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT says that merging into 4 bits rounds
        changed = move(first, 0.2).merge_and_unload()
    return peft.get_peft_model(changed, peft.LoraConfig(task_type="CAUSAL_LM", **SETTINGS))


class Untrained(Trainer):
    """Fails when it takes a step."""

    def training_step(self, *values: Any, **named: Any) -> torch.Tensor:
        """Never called."""
        raise AssertionError("the training has begun")


@pytest.mark.parametrize(
    ("case", "kind", "named"),
    [
        ("another base", CheckpointError, "is not the checkpoint that it is said to be loaded from"),
        ("a merged adapter", CheckpointError, "is not the checkpoint that it is said to be loaded from"),
        ("data", DataError, "no text to compare on"),
        ("spread", UsageError, "spread over processes"),
        ("no place", UsageError, "does not say where its base was loaded from"),
        ("output there", OutputError, "exists"),
        ("no adapter", AdapterError, "the model has no adapter"),
        ("precision", UsageError, "fp31"),
    ],
)
def test_what_cannot_be_exported_is_refused_before_the_first_step(
    case: str,
    kind: type[Exception],
    named: str,
    checkpoint_dir: CheckpointFactory,
    tmp_path: Path,
) -> None:
    model: Any = dense(checkpoint_dir("llama"))
    options: dict[str, Any] = {}
    args = arguments(tmp_path / "run")
    (tmp_path / "run").mkdir(exist_ok=True)
    if case == "another base":
        options["base"] = checkpoint_dir("llama", seed=3)
    elif case == "a merged adapter":
        model = merged_first(checkpoint_dir("llama"))
    elif case == "data":
        options["data"] = tmp_path / "nowhere.jsonl"
    elif case == "spread":
        model.get_base_model().lm_head.weight.data = torch.empty(0)  # as ZeRO-3 leaves it
    elif case == "no place":
        model.get_base_model().config._name_or_path = ""
    elif case == "output there":
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "model.onnx").write_text("mine")
    elif case == "no adapter":
        model = tiny_model("llama")
    elif case == "precision":
        options["precision"] = "fp31"
    callback = ExportCallback(tmp_path / "out", quiet=True, **options)
    trainer = Untrained(model=model, args=args, train_dataset=Rows(), callbacks=[callback])
    before = tree(tmp_path)
    with pytest.raises(kind, match=named):
        trainer.train()
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("kind", "version", "spread"),
    [
        ("NO", None, False),
        ("MULTI_GPU", None, False),
        ("FSDP", 2, True),
        ("FSDP", 1, None),
        ("MEGATRON_LM", None, None),
    ],
)
def test_what_will_spread_the_parameters(
    kind: str, version: int | None, spread: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """accelerate itself makes FSDP's first version on GPUs alone; the rest really runs in test_spread.py."""
    plugin = SimpleNamespace(fsdp_version=version)
    state = SimpleNamespace(distributed_type=accelerate.utils.DistributedType[kind], fsdp_plugin=plugin)
    monkeypatch.setattr(accelerate.state, "AcceleratorState", lambda: state)
    if spread is None:
        with pytest.raises(UsageError, match="does not gather"):
            will_be_spread()
    else:
        assert will_be_spread() is spread


def test_an_export_that_fails_leaves_the_adapter(
    checkpoint_dir: CheckpointFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = dense(checkpoint_dir("llama"))
    callback = ExportCallback(tmp_path / "out", quiet=True, precision="int8", max_kl=1e-12)
    with pytest.raises(ParityError) as failed:
        train(model, callback, tmp_path / "run")
    assert str(tmp_path / "run" / "adapter") in str(failed.value)
    assert not (tmp_path / "out").exists()
    update = read_adapter(tmp_path / "run" / "adapter").updates["model.layers.1.mlp.down_proj"]
    assert torch.equal(update.B, model.get_base_model().model.layers[1].mlp.down_proj.lora_B["default"].weight)
    assert update.B.abs().max() > 0


def test_a_card_beside_the_adapter_stays(checkpoint_dir: CheckpointFactory, tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "README.md").write_text("my words")
    save_trained(dense(checkpoint_dir("llama")), tmp_path / "own")
    assert (tmp_path / "own" / "README.md").read_text() == "my words"
    assert read_adapter(tmp_path / "own").updates


def test_a_branch_that_is_merged_is_refused_at_once() -> None:
    with pytest.raises(UsageError, match="merged, or it is a branch"):
        ExportCallback("out", branch="pooled")


def test_an_option_that_does_not_exist_is_refused_at_once() -> None:
    with pytest.raises(TypeError, match="presicion"):
        ExportCallback("out", presicion="fp32")
