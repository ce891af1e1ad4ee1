"""transformers' own way to export: AutoHfExporter, ExportedModel."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.exporters import AutoExportConfig, AutoHfExporter, ExportedModel

from lora_deploy import export_onnx
from lora_deploy.errors import AdapterError, CheckpointError, UsageError
from lora_deploy.integrations.exporter import OnnxLoraConfig, OnnxLoraExporter
from lora_deploy.verify import verify
from tests.conftest import QUIET_PEFT, CheckpointFactory, logits, token_ids
from tests.peft.models import move

pytestmark = QUIET_PEFT

SETTINGS = {"r": 4, "lora_alpha": 10, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


@pytest.fixture
def model(checkpoint_dir: CheckpointFactory) -> peft.PeftModel:
    """PEFT's layers with an adapter that changes the logits, on a checkpoint."""
    base = LlamaForCausalLM.from_pretrained(checkpoint_dir("llama"), dtype=torch.float32)
    return move(peft.get_peft_model(base, peft.LoraConfig(**SETTINGS)), 0.2).eval()


def export(model: Any, **options: Any) -> ExportedModel:
    """As a user of transformers would."""
    config = AutoExportConfig.from_dict({"export_format": "onnx-lora", **options})
    exporter = AutoHfExporter.from_config(config)
    assert isinstance(exporter, OnnxLoraExporter)
    return exporter.export(model, {"input_ids": token_ids()}, config)


def test_the_options_are_those_of_export_onnx() -> None:
    theirs = inspect.signature(export_onnx).parameters
    left_out = {"model", "adapter", "output", "overwrite", "quantization", "double_quant"}
    left_out |= {"example_inputs", "dynamic_axes", "on_progress"}
    assert OnnxLoraConfig().options() == {name: value.default for name, value in theirs.items() if name not in left_out}


def test_it_runs_from_memory_and_from_disk(model: peft.PeftModel, tmp_path: Path) -> None:
    ids = token_ids()
    expected = logits(model, ids)
    exported = export(model, adapter=str(tmp_path / "own"))
    assert (exported(input_ids=ids).logits - expected).abs().max() < 1e-3
    with model.disable_adapter():
        assert (exported(input_ids=ids).logits - logits(model, ids)).abs().max() > 0.1
    place = Path(exported.program.meta["path"]).parent
    exported.save_pretrained(tmp_path / "saved")
    del exported
    assert not place.exists()
    loaded = ExportedModel.from_pretrained(tmp_path / "saved")
    assert (loaded(input_ids=ids, attention_mask=torch.ones_like(ids)).logits - expected).abs().max() < 1e-3
    assert loaded.dtype == torch.float32
    assert loaded.device == torch.device("cpu")
    assert loaded.config is not None
    assert loaded.config.model_type == "llama"
    assert str(tmp_path) not in (tmp_path / "saved" / "export.json").read_text()
    assert verify(
        tmp_path / "saved", adapter=["own=" + str(tmp_path / "own")]
    ).passed  # the manifest holds for what was saved


def test_token_by_token_is_the_same(model: peft.PeftModel) -> None:
    ids = token_ids()
    exported = export(model)
    first = exported(input_ids=ids[:, :5])
    mask = torch.ones_like(ids)
    rest = exported(input_ids=ids[:, 5:], attention_mask=mask, past_key_values=first.past_key_values)
    found = torch.cat([first.logits, rest.logits], dim=1)
    assert (found - logits(model, ids)).abs().max() < 1e-3


def test_a_branch_is_chosen_when_it_is_opened(model: peft.PeftModel, tmp_path: Path) -> None:
    export(model, merge=False, output=str(tmp_path / "out")).save_pretrained(tmp_path / "saved")
    assert (tmp_path / "out" / "adapters" / "adapter.onnx_adapter").is_file()
    ids = token_ids()
    adapted = ExportedModel.from_pretrained(tmp_path / "saved", adapter="adapter")
    assert (adapted(input_ids=ids).logits - logits(model, ids)).abs().max() < 1e-3
    bare = ExportedModel.from_pretrained(tmp_path / "saved")
    assert (bare(input_ids=ids).logits - logits(model, ids)).abs().max() > 0.1
    with model.disable_adapter():
        assert (bare(input_ids=ids).logits - logits(model, ids)).abs().max() < 1e-3


def test_generation_is_the_same_graph(model: peft.PeftModel) -> None:
    exporter = OnnxLoraExporter()
    exported = exporter.export_for_generation(model, {}, OnnxLoraConfig(verify=False))
    assert list(exported.components) == ["model"]


def test_a_classifier(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    base = BertForSequenceClassification(BertConfig(vocab_size=60, num_labels=3, initializer_range=0.3, **sizes)).eval()
    base.save_pretrained(tmp_path / "base")
    base = BertForSequenceClassification.from_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=3, lora_alpha=7, target_modules=["query", "value"], task_type="SEQ_CLS")
    model = move(peft.get_peft_model(base, config), 0.3).eval()
    ids = torch.randint(3, 60, (2, 9))
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    exported = export(model)
    assert (exported(input_ids=ids).logits - expected).abs().max() < 1e-3
    with torch.no_grad(), model.disable_adapter():
        assert (exported(input_ids=ids).logits - model(input_ids=ids).logits).abs().max() > 0.1


def test_what_it_cannot_export_is_refused(checkpoint_dir: CheckpointFactory, tmp_path: Path) -> None:
    base = LlamaForCausalLM.from_pretrained(checkpoint_dir("llama"))
    with pytest.raises(AdapterError, match="no adapter"):
        export(base)
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 40}
    config = peft.LoraConfig(target_modules=["q"])
    with pytest.raises(UsageError, match="three graphs"):
        export(peft.get_peft_model(T5ForConditionalGeneration(T5Config(**sizes)), config))


def test_a_graph_without_its_weights_says_how_to_get_them(model: peft.PeftModel, tmp_path: Path) -> None:
    export(model, verify=False).save_pretrained(tmp_path / "saved")
    next((tmp_path / "saved").glob("*.data")).unlink()
    with pytest.raises(CheckpointError, match="snapshot_download"):
        ExportedModel.from_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "export.json").read_text())["export_format"] == "onnx-lora"
