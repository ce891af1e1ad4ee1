"""Bases that are not as one would make them: each is exported right or refused, never wrong without a word."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from lora_deploy.adapter import write_adapter
from lora_deploy.errors import CheckpointError, OutputError
from lora_deploy.export import export_onnx
from lora_deploy.quantization import QuantizationScheme, load_base_model, quantized_weight
from lora_deploy.quantization.base import TrainingBase
from tests.conftest import QUANTIZED, CheckpointFactory, random_adapter, save_tiny, tiny_model

AdapterFactory = Callable[..., Path]


def _configure(directory: Path, **values: Any) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize("kind", ["mistral", "qwen2"])
def test_a_window_of_a_configuration_that_another_class_wrote_is_exported(kind: str, tmp_path: Path) -> None:
    base = save_tiny("llama" if kind == "mistral" else "qwen2", "none", tmp_path / "base")
    window = {"layer_types": None, "use_sliding_window": True, "max_window_layers": 0}
    extra = {"model_type": "mistral", "architectures": ["MistralForCausalLM"]} if kind == "mistral" else window
    _configure(base, sliding_window=5, **extra)
    result = export_onnx(base, output=tmp_path / "out", graph="mobius")
    assert result.report is not None
    assert result.report.passed


@pytest.mark.parametrize("method", QUANTIZED)
def test_a_quantized_output_head_is_dequantized(method: str, tmp_path: Path) -> None:
    """transformers quantizes the head too as soon as other modules are named to be left alone."""
    dense = save_tiny("llama", "none", tmp_path / "dense")
    options: dict[str, Any] = {"llm_int8_skip_modules": ["q_proj"]}
    if method == "int8":
        options["load_in_8bit"] = True
    else:
        options |= {"load_in_4bit": True, "bnb_4bit_quant_type": method}
    loaded = AutoModelForCausalLM.from_pretrained(dense, quantization_config=BitsAndBytesConfig(**options))
    loaded.save_pretrained(tmp_path / "base")
    base = TrainingBase(tmp_path / "base")
    assert base.weight("lm_head").scheme == method
    assert base.weight("model.layers.0.self_attn.q_proj").scheme == "none"
    write_adapter(random_adapter(tiny_model("llama")), tmp_path / "adapter")
    report = export_onnx(tmp_path / "base", tmp_path / "adapter", output=tmp_path / "out").report
    assert report is not None
    assert report.passed


@pytest.mark.parametrize(("stored", "configured"), [(torch.float32, "bfloat16"), (torch.float32, "float16")])
@pytest.mark.parametrize("method", ["none", "nf4"])
def test_weights_are_taken_in_the_type_that_the_configuration_loads_them_in(
    method: str, stored: torch.dtype, configured: str, adapter_dir: AdapterFactory, tmp_path: Path
) -> None:
    base = save_tiny("llama", "none", tmp_path / "base", dtype=stored)
    _configure(base, dtype=configured)
    result = export_onnx(base, adapter_dir("llama"), output=tmp_path / "out", quantization=method)
    assert result.report is not None
    assert result.report.passed
    name = "model.layers.0.mlp.up_proj"
    trained = load_base_model(str(base), method).get_submodule(name)
    ours = TrainingBase(base, QuantizationScheme(method=method)).weight(name)  # type: ignore[arg-type]
    assert torch.equal(ours.dequantize(), quantized_weight(trained).dequantize())


def test_a_head_that_is_its_own_is_kept_although_the_configuration_ties_it(
    adapter_dir: AdapterFactory, tmp_path: Path
) -> None:
    base = save_tiny("llama", "none", tmp_path / "base")
    _configure(base, tie_word_embeddings=True)
    report = export_onnx(base, adapter_dir("llama"), output=tmp_path / "out", quantization="nf4").report
    assert report is not None
    assert report.passed


def test_a_copy_of_the_embedding_under_the_heads_name_stays_tied(adapter_dir: AdapterFactory, tmp_path: Path) -> None:
    base = save_tiny("llama", "none", tmp_path / "base", tie_word_embeddings=True)
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    assert TrainingBase(base).aliases == {"lm_head.weight": "model.embed_tokens.weight"}
    report = export_onnx(base, adapter_dir("llama"), output=tmp_path / "out", quantization="nf4").report
    assert report is not None
    assert report.passed


@pytest.mark.parametrize("context", [10, 40])
def test_a_model_of_a_short_context_is_checked_within_it(context: int, tmp_path: Path) -> None:
    base = save_tiny("llama", "none", tmp_path / "base", max_position_embeddings=context)
    report = export_onnx(base, output=tmp_path / "out").report
    assert report is not None
    assert report.passed


def test_a_damaged_tokenizer_does_not_keep_the_weights_from_being_checked(
    own_checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    base = own_checkpoint("llama")
    (base / "tokenizer.json").write_text("{")
    report = export_onnx(base, output=tmp_path / "out").report
    assert report is not None
    assert report.passed


@pytest.mark.parametrize("which", ["base", "adapter"])
def test_overwriting_the_input_is_refused(which: str, tmp_path: Path, adapter_dir: AdapterFactory) -> None:
    base = save_tiny("llama", "nf4", tmp_path / "base")
    write_adapter(random_adapter(tiny_model("llama")), tmp_path / "adapter")
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    with pytest.raises(OutputError, match="directory of the model or the adapter"):
        export_onnx(base, tmp_path / "adapter", output=tmp_path / which, overwrite=True)
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


def test_overwrite_replaces_an_export_only(checkpoint_dir: CheckpointFactory, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputError, match="exists"):
        export_onnx(checkpoint_dir("llama"), output=tmp_path / "out", overwrite=True)


def test_nothing_of_an_older_export_is_left_beside_a_new_one(checkpoint_dir: CheckpointFactory, tmp_path: Path) -> None:
    output = tmp_path / "out"
    export_onnx(checkpoint_dir("llama"), output=output)
    assert (output / "parity.json").exists()
    (output / "chat_template.jinja").write_text("of an older base")
    export_onnx(checkpoint_dir("qwen2"), output=output, overwrite=True, verify=False)
    assert not (output / "parity.json").exists()
    assert not (output / "chat_template.jinja").exists()
    assert len(list(output.glob("*.onnx.data"))) == 1


@pytest.mark.parametrize("section", ["bitsandbytes", {"load_in_4bit": True, "bnb_4bit_quant_type": "nf5"}])
def test_a_quantization_that_cannot_be_read_is_bad_input(section: Any, own_checkpoint: CheckpointFactory) -> None:
    base = own_checkpoint("llama")
    _configure(base, quantization_config=section)
    with pytest.raises(CheckpointError, match=r"cannot be read|of the wrong kind"):
        TrainingBase(base)


def test_a_checkpoint_is_not_loaded_as_another_scheme_than_its_own(checkpoint_dir: CheckpointFactory) -> None:
    with pytest.raises(CheckpointError, match="quantized already"):
        load_base_model(str(checkpoint_dir("llama", "int8")), "nf4")
    with pytest.raises(CheckpointError, match="not a directory"):
        load_base_model("/nonexistent/model")
