"""Taking an adapter out of a model and putting one into it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_deploy.adapter import LoraUpdate, adapter_of, apply_adapter, load_adapter, save_adapter
from lora_deploy.config import LoraConfig
from lora_deploy.errors import AdapterError, ConfigError
from lora_deploy.layers import get_lora_config, lora_layers, merge_adapter
from lora_deploy.quantization import quantize_model
from tests.conftest import QUANTIZED, TINY_FAMILIES, logits, random_adapter, tiny_model

TARGET = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize("method", ["none", *QUANTIZED])
@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_an_adapter_that_is_saved_and_loaded_computes_the_same_bit_for_bit(
    family: str, method: str, tmp_path: Path
) -> None:
    model = quantize_model(tiny_model(family), method)
    random_adapter(model, bias="all", modules_to_save=["lm_head"], target_modules="all-linear")
    save_adapter(model, tmp_path)
    again = load_adapter(quantize_model(tiny_model(family), method), tmp_path)
    assert torch.equal(logits(again), logits(model))
    assert get_lora_config(again).to_json() == get_lora_config(model).to_json()
    trained = [{name for name, p in m.named_parameters() if p.requires_grad} for m in (model, again)]
    assert trained[0] == trained[1]


def test_what_is_taken_out_is_a_copy() -> None:
    model = tiny_model("qwen2")
    adapter = random_adapter(model, bias="lora_only", modules_to_save=["lm_head"])
    before = {name: values.clone() for name, values in adapter.parameters.items()}
    a = adapter.updates[TARGET].A.clone()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(adapter.updates[TARGET].A, a)
    assert before.keys() == {"lm_head.weight"} | {
        f"model.layers.{layer}.self_attn.{name}_proj.bias" for layer in (0, 1) for name in "qkv"
    }
    assert all(torch.equal(adapter.parameters[name], values) for name, values in before.items())


def test_the_update_of_the_adapter_is_the_update_of_the_layer() -> None:
    model = tiny_model("llama")
    adapter = random_adapter(model)
    for name, layer in lora_layers(model).items():
        torch.testing.assert_close(adapter.delta_weight(name), layer.delta_weight())
        assert adapter.updates[name].shape == layer.base_weight().shape
    assert adapter.updates[TARGET].scaling == 2.5


@pytest.mark.parametrize("method", ["none", "nf4"])
def test_an_adapter_loaded_into_a_merged_model_takes_effect(method: str) -> None:
    adapter = random_adapter(quantize_model(tiny_model("llama"), method), merge_weights=True)
    expected = logits(apply_adapter(quantize_model(tiny_model("llama"), method).train(), adapter).eval())
    fresh = apply_adapter(quantize_model(tiny_model("llama"), method).eval(), adapter)
    assert all(layer.merged for layer in lora_layers(fresh).values())
    assert torch.equal(logits(fresh), expected)
    other = random_adapter(tiny_model("llama"), seed=2)
    merge_adapter(apply_adapter(fresh, other))
    assert (logits(fresh) - expected).abs().max() > 0.1


def test_a_second_adapter_of_the_same_kind_takes_the_place_of_the_first() -> None:
    first, second = (random_adapter(tiny_model("llama"), seed=seed) for seed in (1, 2))
    model = apply_adapter(apply_adapter(tiny_model("llama"), first), second)
    assert torch.equal(logits(model), logits(apply_adapter(tiny_model("llama"), second)))


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"r": 1}, TARGET),  # would broadcast into rank 4
        ({"r": 8}, TARGET),
        ({"target_modules": ["q_proj"]}, "mlp"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "bias"),
    ],
)
def test_a_second_adapter_of_another_kind_is_refused_and_the_first_stays(config: dict[str, Any], named: str) -> None:
    model = tiny_model("llama")
    random_adapter(model)
    before = logits(model)
    other = random_adapter(tiny_model("llama"), **config)
    with pytest.raises(AdapterError) as caught:
        apply_adapter(model, other)
    assert named in caught.value.details["tensor"]
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ({"hidden_size": 48, "head_dim": 12}, "(48, 112)"),
        ({"intermediate_size": 80}, "(64, 80)"),
        ({"num_hidden_layers": 1}, "linear layers"),
        ({"vocab_size": 140}, "(140, 64)"),
    ],
)
@pytest.mark.parametrize("method", ["none", "nf4", "int8"])
def test_an_adapter_of_another_base_is_refused_before_the_base_is_changed(
    overrides: dict[str, int], told: str, method: str, tmp_path: Path
) -> None:
    model = tiny_model("llama")
    random_adapter(model, modules_to_save=["lm_head"])
    save_adapter(model, tmp_path)
    other = quantize_model(tiny_model("llama", **overrides), method)
    before = logits(other)
    with pytest.raises(AdapterError) as caught:
        load_adapter(other, tmp_path)
    assert told in caught.value.details["expected"]
    assert caught.value.details["file"] == str(tmp_path)
    assert caught.value.details["tensor"]
    assert caught.value.exit_code == 3
    assert not lora_layers(other)
    assert torch.equal(logits(other), before)


def test_an_adapter_for_a_module_that_is_no_linear_layer_is_refused() -> None:
    adapter = random_adapter(tiny_model("llama"), target_modules=["q_proj"])
    update = LoraUpdate(torch.ones(4, 131), torch.ones(64, 4), 1.0)
    odd = dataclasses.replace(adapter, updates={"model.embed_tokens": update})
    with pytest.raises(AdapterError) as caught:
        apply_adapter(tiny_model("llama"), odd)
    assert caught.value.details["tensor"] == "model.embed_tokens"


def test_saving_a_model_without_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no adapter"):
        save_adapter(tiny_model("llama"), tmp_path)
    assert not list(tmp_path.iterdir())


def test_targets_are_recorded_as_the_user_gave_them() -> None:
    adapter = random_adapter(tiny_model("llama"), target_modules=r".*\.1\..*_proj")
    again = apply_adapter(tiny_model("llama"), adapter)
    assert get_lora_config(again).target_modules == r".*\.1\..*_proj"
    assert adapter_of(again).updates.keys() == adapter.updates.keys()
    assert isinstance(get_lora_config(again), LoraConfig)
