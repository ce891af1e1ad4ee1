"""Quantizing whole models, reading weights back, and what bitsandbytes does to them on a CPU."""

from __future__ import annotations

import copy

import bitsandbytes as bnb
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from lora_deploy.errors import CheckpointError
from lora_deploy.quantization import QuantizationScheme, keep_codes, load_base_model, quantize_model, quantized_weight
from lora_deploy.quantization.hashes import hash_codes
from lora_deploy.quantization.model import linear_modules
from tests.conftest import (
    QUANTIZED,
    TINY_FAMILIES,
    CheckpointFactory,
    assert_same_weight,
    load_quantized,
    logits,
    random_adapter,
    tiny_model,
)

REPACKS = bool(bnb.functional.has_avx512bf16())
# (in, out): whole blocks in a row; blocks that cross rows, with and without the vectors of bitsandbytes' AVX512 kernel.
SIZES = [(128, 64), (112, 64), (48, 96), (70, 33), (7, 5)]


def _layer(method: str, size: tuple[int, int], dtype: torch.dtype = torch.float32, **scheme: bool) -> nn.Module:
    holder = nn.Sequential(nn.Linear(*size).to(dtype))
    return quantize_model(holder, QuantizationScheme(method=method, **scheme)).train()[0]


@pytest.mark.parametrize("method", QUANTIZED)
@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_quantize_model_gives_the_codes_that_transformers_and_bitsandbytes_give(
    family: str, method: str, checkpoint_dir: CheckpointFactory
) -> None:
    theirs = load_quantized(checkpoint_dir(family), method)
    ours = quantize_model(tiny_model(family), method)
    assert linear_modules(ours).keys() == linear_modules(theirs).keys()
    for name, module in linear_modules(ours).items():
        assert type(module).__mro__[1 if "Exact" in type(module).__name__ else 0] is type(theirs.get_submodule(name))
        assert_same_weight(quantized_weight(module), quantized_weight(theirs.get_submodule(name)))
    assert type(ours.get_output_embeddings()) is nn.Linear


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("double_quant", [False, True], ids=["single", "double"])
def test_the_codes_are_those_of_the_checkpoints_own_type(
    dtype: torch.dtype, double_quant: bool, checkpoint_dir: CheckpointFactory
) -> None:
    directory = checkpoint_dir("llama", dtype=dtype)
    theirs = load_quantized(directory, "nf4", double_quant=double_quant, dtype="auto")
    ours = load_base_model(str(directory), QuantizationScheme(method="nf4", double_quant=double_quant))
    for name, module in linear_modules(ours).items():
        assert_same_weight(quantized_weight(module), quantized_weight(theirs.get_submodule(name)))
    assert hash_codes(ours) == hash_codes(theirs)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("method", QUANTIZED)
def test_the_training_forward_is_dequantize_and_matmul(method: str, size: tuple[int, int]) -> None:
    layer = _layer(method, size)
    for x in (torch.randn(3, size[0]), torch.randn(2, 3, size[0], requires_grad=True)):
        expected = F.linear(x, quantized_weight(layer).dequantize(), layer.bias)
        torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("method", QUANTIZED)
def test_the_gradient_of_the_input_flows_through_the_dequantized_weight(
    method: str, size: tuple[int, int], dtype: torch.dtype
) -> None:
    layer = _layer(method, size, dtype)
    x, up = torch.randn(3, size[0], requires_grad=True), torch.randn(3, size[1])
    layer(x).backward(up)
    torch.testing.assert_close(x.grad, up @ quantized_weight(layer).dequantize(), rtol=1e-5, atol=1e-5)
    assert layer.weight.grad is None


@pytest.mark.parametrize("method", ["nf4", "fp4", "int8"])
def test_a_prequantized_bfloat16_base_trains_on_the_same_values_forward_and_backward(
    method: str, checkpoint_dir: CheckpointFactory
) -> None:
    model = load_base_model(str(checkpoint_dir("llama", method, dtype=torch.bfloat16)))
    for layer in linear_modules(model).values():
        weight = quantized_weight(layer).dequantize()
        x = torch.randn(3, weight.shape[1], requires_grad=True)
        layer(x).sum().backward()
        torch.testing.assert_close(layer(x), x @ weight.t(), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(x.grad, weight.sum(0).expand_as(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["nf4", "fp4"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_keep_codes_keeps_every_bit_through_an_eval_forward(size: tuple[int, int], method: str) -> None:
    layer = _layer(method, size).eval()
    before = copy.deepcopy(quantized_weight(layer))
    x = torch.randn(3, size[0])
    with torch.no_grad():
        found = layer(x)
    assert_same_weight(quantized_weight(layer), before)
    torch.testing.assert_close(found, F.linear(x, before.dequantize(), layer.bias), rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not REPACKS, reason="bitsandbytes repacks only on a processor with AVX512-BF16")
def test_without_keep_codes_bitsandbytes_repacks_and_reading_the_weight_is_refused() -> None:
    layer = bnb.nn.Linear4bit(128, 64, quant_type="nf4").to("cpu").eval()
    with torch.no_grad():
        layer(torch.randn(3, 128))
    with pytest.raises(CheckpointError, match="keep_codes") as caught:
        quantized_weight(layer)
    assert caught.value.exit_code == 3


def test_a_layer_whose_blocks_cross_rows_can_be_copied_and_still_computes_its_codes() -> None:
    layer = _layer("nf4", (48, 96))
    x = torch.randn(3, 48)
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))


@pytest.mark.parametrize("method", QUANTIZED)
def test_a_conv1d_becomes_a_quantized_linear_of_the_transposed_weight(method: str) -> None:
    conv = Conv1D(33, 70)
    conv.bias.data = torch.randn(33)
    twin = nn.Linear(70, 33)
    twin.weight.data, twin.bias.data = conv.weight.data.t().contiguous(), conv.bias.data
    from_conv, from_linear = quantize_model(nn.Sequential(conv, twin), method)
    assert_same_weight(quantized_weight(from_conv), quantized_weight(from_linear))
    assert torch.equal(from_conv.bias, conv.bias)


def test_modules_to_skip_and_the_output_head_stay_dense() -> None:
    model = quantize_model(
        tiny_model("llama"), QuantizationScheme(method="nf4", skip_modules=("v_proj", "0.mlp.up_proj"))
    )
    dense = {name for name, module in linear_modules(model).items() if type(module) is nn.Linear}
    assert dense == {
        "model.layers.0.self_attn.v_proj",
        "model.layers.1.self_attn.v_proj",
        "model.layers.0.mlp.up_proj",
    }


def test_quantizing_twice_is_refused_and_none_quantizes_nothing() -> None:
    model = tiny_model("llama")
    assert all(type(module) is nn.Linear for module in linear_modules(quantize_model(model, "none")).values())
    with pytest.raises(CheckpointError, match="quantized already"):
        quantize_model(quantize_model(model, "nf4"), "nf4")


def test_a_bitsandbytes_layer_that_is_not_quantized_yet_cannot_be_read() -> None:
    for layer in (bnb.nn.Linear4bit(64, 64), bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False)):
        with pytest.raises(TypeError, match="not quantized yet"):
            quantized_weight(layer)
    with pytest.raises(TypeError, match="LayerNorm"):
        quantized_weight(nn.LayerNorm(3))


def test_int8_codes_are_found_before_and_after_the_first_forward() -> None:
    layer = _layer("int8", (70, 33))
    before = copy.deepcopy(quantized_weight(layer))
    layer(torch.randn(3, 70))
    assert_same_weight(quantized_weight(layer), before)


@pytest.mark.parametrize("stored", ["none", "nf4", "int8"])
def test_load_base_model_is_one_call_to_a_frozen_float32_model_in_training_mode(
    stored: str, checkpoint_dir: CheckpointFactory
) -> None:
    method = "nf4" if stored == "none" else stored
    model = load_base_model(str(checkpoint_dir("qwen2", stored, dtype=torch.bfloat16)), method)
    assert model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert {quantized_weight(module).scheme for module in linear_modules(model).values()} == {method}
    kinds = {parameter.dtype for parameter in model.parameters()}
    assert kinds == {torch.float32, torch.int8 if stored == "int8" else torch.uint8}
    assert torch.isfinite(logits(model)).all()


def test_hash_codes_sees_a_changed_code_but_no_adapter() -> None:
    model = quantize_model(tiny_model("llama"), "nf4")
    before = hash_codes(model)
    random_adapter(model)
    assert hash_codes(model) == before
    model.model.layers[0].mlp.up_proj.base_layer.weight.data[0] ^= 1
    assert hash_codes(model) != before


def test_keep_codes_reaches_layers_that_transformers_loaded(checkpoint_dir: CheckpointFactory) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint_dir("gpt2", "nf4")).eval()
    keep_codes(model)
    before = hash_codes(model)
    logits(model)
    assert hash_codes(model) == before
