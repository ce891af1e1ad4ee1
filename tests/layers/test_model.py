"""get_lora_model: which modules, what is trained, and what is told when a target is wrong."""

from __future__ import annotations

import logging
from typing import Any

import peft
import pytest
import torch
from transformers import PreTrainedModel

from lora_deploy.config import LoraConfig
from lora_deploy.errors import ConfigError
from lora_deploy.layers import (
    LoraLinear,
    count_parameters,
    get_lora_config,
    get_lora_model,
    lora_layers,
    merge_adapter,
    unmerge_adapter,
)
from lora_deploy.quantization import quantize_model, quantized_weight
from lora_deploy.quantization.hashes import hash_codes
from lora_deploy.quantization.model import linear_modules
from tests.conftest import QUANTIZED, TINY_FAMILIES, logits, random_adapter, tiny_model

TARGETS: dict[str, dict[str, Any]] = {
    "all-linear": {"target_modules": "all-linear"},
    "last parts": {"target_modules": ["q_proj", "down_proj"]},
    "longer ends": {"target_modules": ["self_attn.v_proj", "0.mlp.up_proj"]},
    "a whole name": {"target_modules": ["model.layers.1.self_attn.o_proj"]},
    "a regex": {"target_modules": r".*\.(1)\.self_attn\.[qk]_proj"},
    "a regex for everything": {"target_modules": r".*_proj"},
    "an excluded list": {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["1.self_attn.q_proj"]},
    "an excluded regex": {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*\.0\..*"},
    "all but": {"target_modules": "all-linear", "exclude_modules": ["down_proj"]},
    "one layer": {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": 1},
    "a list of layers": {"target_modules": ["q_proj"], "layers_to_transform": [0]},
    "no layers named": {"target_modules": ["q_proj"], "layers_to_transform": []},
    "a layers pattern": {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    "the head": {"target_modules": ["lm_head", "q_proj"]},
    "a saved head": {"target_modules": "all-linear", "modules_to_save": ["lm_head"]},
    "a saved linear": {"target_modules": "all-linear", "modules_to_save": ["down_proj"]},
    "a saved block": {"target_modules": r".*\.(q|up)_proj", "modules_to_save": ["mlp"]},
    "a saved block, all": {"target_modules": "all-linear", "modules_to_save": ["1.mlp"]},
}


def _peft_targets(model: PreTrainedModel, config: dict[str, Any]) -> set[str]:
    wrapped = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **config))
    return {
        name.removeprefix("base_model.model.")
        for name, module in wrapped.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }


def _trainable(model: torch.nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("case", TARGETS)
def test_the_targets_are_those_that_peft_chooses(case: str) -> None:
    expected = _peft_targets(tiny_model("llama"), TARGETS[case])
    ours = get_lora_model(tiny_model("llama"), LoraConfig(**TARGETS[case]))
    assert set(lora_layers(ours)) == expected
    assert expected


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_by_default_every_linear_layer_but_the_head_is_adapted(family: str) -> None:
    model = tiny_model(family)
    names = set(linear_modules(model))
    assert len(names) == (8 if family == "gpt2" else 14)
    assert set(lora_layers(get_lora_model(model, LoraConfig()))) == names
    assert not isinstance(model.get_output_embeddings(), LoraLinear)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("method", ["none", *QUANTIZED])
@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_at_step_zero_the_model_is_the_base_bit_for_bit(family: str, method: str, training: bool) -> None:
    model = quantize_model(tiny_model(family), method).train(training)
    before = logits(model)
    assert torch.equal(logits(get_lora_model(model, LoraConfig())), before)
    random_adapter(quantize_model(tiny_model(family), method))


@pytest.mark.parametrize("method", ["none", *QUANTIZED])
@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_merging_a_model_changes_nothing_and_unmerging_restores_every_bit(family: str, method: str) -> None:
    model = quantize_model(tiny_model(family), method).train()
    base = logits(model)
    random_adapter(model)
    before, codes = logits(model), hash_codes(model)
    assert (before - base).abs().max() > 1
    merge_adapter(model)
    torch.testing.assert_close(logits(model), before, rtol=1e-3, atol=1e-3)
    unmerge_adapter(model)
    assert torch.equal(logits(model), before)
    assert hash_codes(model) == codes


def test_merge_weights_follows_the_mode_of_the_whole_model() -> None:
    model = get_lora_model(tiny_model("llama").train(), LoraConfig(merge_weights=True))
    assert not any(layer.merged for layer in lora_layers(model).values())
    assert all(layer.merged for layer in lora_layers(model.eval()).values())
    assert not any(layer.merged for layer in lora_layers(model.train()).values())


def test_ranks_and_scalings_of_single_modules_follow_the_patterns() -> None:
    config = LoraConfig(r=4, lora_alpha=10, rank_pattern={"q_proj": 2}, alpha_pattern={r"1\.mlp\.up_proj": 6})
    layers = lora_layers(get_lora_model(tiny_model("llama"), config))
    for name, layer in layers.items():
        assert layer.r == (2 if name.endswith("q_proj") else 4)
        assert layer.scaling == (6 if name.endswith("1.mlp.up_proj") else 10) / layer.r


@pytest.mark.parametrize("method", ["none", "nf4", "int8"])
@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_exactly_the_parameters_that_peft_trains_are_trained_and_get_a_gradient(bias: str, method: str) -> None:
    config = {"target_modules": ["q_proj", "o_proj"], "bias": bias, "modules_to_save": ["lm_head", "model.norm"]}
    theirs = peft.get_peft_model(tiny_model("qwen2"), peft.LoraConfig(**config))
    model = get_lora_model(quantize_model(tiny_model("qwen2"), method), LoraConfig(**config)).train()
    expected = {
        name.replace("base_model.model.", "", 1).replace("modules_to_save.default.", "").replace(".default.", ".")
        for name in _trainable(theirs)
    }
    assert _trainable(model) == expected
    model(input_ids=torch.arange(3, 12)[None]).logits.square().sum().backward()
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == expected


@pytest.mark.parametrize("method", ["none", *QUANTIZED])
def test_parameters_are_counted_as_the_numbers_they_stand_for(method: str) -> None:
    model = tiny_model("llama")
    base = sum(parameter.numel() for parameter in model.parameters())
    get_lora_model(quantize_model(model, method), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    trained = 2 * 4 * ((64 + 64) + (64 + 32))
    assert count_parameters(model) == (trained, base + trained)
    share = f"{trained / (base + trained):.2%}"
    assert str(count_parameters(model)) == f"1,792 of {base + trained:,} parameters are trained ({share})"


def test_the_count_of_parameters_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "lora_deploy"):
        model = get_lora_model(tiny_model("llama"), LoraConfig())
    assert str(count_parameters(model)) in caplog.text


@pytest.mark.parametrize(
    ("targets", "near"),
    [(["q_porj"], "q_proj"), (["q_proj", "up_prj"], "up_proj"), (r".*\.gate_prj", "gate_proj"), (["zzz"], "down_proj")],
)
def test_a_target_that_matches_nothing_is_an_error_that_lists_near_names(targets: Any, near: str) -> None:
    with pytest.raises(ConfigError, match=near) as caught:
        get_lora_model(tiny_model("llama"), LoraConfig(target_modules=targets))
    assert (targets if isinstance(targets, str) else targets[-1]) in caught.value.details["tensor"]
    assert caught.value.exit_code == 3


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"target_modules": ["norm"]}, "no linear layer and no embedding"),
        ({"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}, "no module is left"),
        ({"target_modules": ["q_proj"], "layers_to_transform": [7]}, "no module is left"),
        ({"modules_to_save": ["lm_haed"]}, "lm_head"),
    ],
)
def test_a_configuration_that_cannot_be_followed_leaves_the_model_as_it_was(config: dict[str, Any], told: str) -> None:
    model = tiny_model("llama")
    with pytest.raises(ConfigError, match=told):
        get_lora_model(model, LoraConfig(**config))
    assert not lora_layers(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_second_adapter_on_the_same_model_is_refused() -> None:
    model = get_lora_model(tiny_model("llama"), LoraConfig())
    with pytest.raises(ConfigError, match="already"):
        get_lora_model(model, LoraConfig())


def test_a_model_without_adapter_has_no_configuration() -> None:
    with pytest.raises(ConfigError, match="no adapter"):
        get_lora_config(tiny_model("llama"))


def test_a_saved_head_is_a_copy_so_the_tied_embedding_stays_the_bases() -> None:
    model = tiny_model("gpt2")
    embedding = model.transformer.wte.weight.detach().clone()
    random_adapter(model, modules_to_save=["lm_head"])
    assert torch.equal(model.transformer.wte.weight, embedding)
    assert not model.transformer.wte.weight.requires_grad
    assert not torch.equal(model.lm_head.weight, embedding)


def test_a_quantized_module_cannot_be_trained_whole() -> None:
    model = quantize_model(tiny_model("llama"), "nf4")
    with pytest.raises(ConfigError, match="quantized"):
        get_lora_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=["down_proj"]))


@pytest.mark.parametrize("saved", ["lm_head", "model.norm", "embed_tokens", "mlp"])
def test_a_saved_module_of_a_bfloat16_model_is_trained_in_float32_and_still_fits_its_neighbours(saved: str) -> None:
    model = tiny_model("llama").bfloat16()
    expected = logits(model)
    get_lora_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=[saved]))
    assert {parameter.dtype for parameter in model.parameters() if parameter.requires_grad} == {torch.float32}
    assert {parameter.dtype for parameter in model.parameters() if not parameter.requires_grad} == {torch.bfloat16}
    torch.testing.assert_close(logits(model), expected, rtol=5e-2, atol=1e-1)


def test_fan_in_fan_out_is_set_from_the_layers_and_a_wrong_value_is_warned_about(
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert get_lora_config(get_lora_model(tiny_model("gpt2"), LoraConfig())).fan_in_fan_out
    assert not caplog.records
    model = get_lora_model(tiny_model("llama"), LoraConfig(fan_in_fan_out=True))
    assert "no Conv1D" in caplog.text
    q_proj = model.model.layers[0].self_attn.q_proj
    assert torch.equal(q_proj.base_weight().dequantize(), quantized_weight(q_proj.base_layer).dequantize())
    assert not get_lora_config(model).fan_in_fan_out
