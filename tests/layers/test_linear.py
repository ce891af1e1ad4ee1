"""LoraLinear over every kind of base: forward, gradients, merging."""

from __future__ import annotations

import copy
import math

import bitsandbytes as bnb
import peft
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lora_deploy.layers import LoraLinear
from lora_deploy.quantization import quantized_weight
from tests.layers.bases import IN, KINDS, OUT, bits, make_base

RANK, ALPHA = 4, 10
SCALING = ALPHA / RANK


def _lora(base: nn.Module, **options: object) -> LoraLinear:
    """An adapter on the base whose A and B are both random."""
    layer = LoraLinear.from_base(base, RANK, ALPHA, **options)
    nn.init.normal_(layer.lora_A.weight, std=0.3)
    nn.init.normal_(layer.lora_B.weight, std=0.3)
    return layer


def _explicit(layer: LoraLinear, x: torch.Tensor) -> torch.Tensor:
    """W0 x + b + alpha / r * B (A x), with the base's weight dequantized."""
    base = layer.base_layer
    h = F.linear(x, quantized_weight(base).dequantize(), base.bias)
    return h + ALPHA / RANK * (x @ layer.lora_A.weight.t() @ layer.lora_B.weight.t())


@pytest.mark.parametrize("kind", KINDS)
def test_the_forward_is_base_plus_scaled_branch(kind: str) -> None:
    layer = _lora(make_base(kind))
    x = torch.randn(2, 3, IN)
    torch.testing.assert_close(layer(x), _explicit(layer, x), rtol=1e-5, atol=1e-5)
    assert (layer(x) - layer.base_layer(x)).abs().max() > 1


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("init", [True, "gaussian"])
@pytest.mark.parametrize("kind", KINDS)
def test_at_step_zero_the_output_is_the_bases_bit_for_bit(kind: str, init: bool | str, training: bool) -> None:
    base = make_base(kind).train(training)
    x = torch.randn(5, IN)
    before = base(x)
    layer = LoraLinear.from_base(base, RANK, ALPHA, init_lora_weights=init)
    assert layer.training == training
    assert torch.equal(layer(x), before)
    assert torch.count_nonzero(layer.lora_A.weight) == RANK * IN
    assert torch.count_nonzero(layer.lora_B.weight) == 0


def test_the_initialization_has_the_spread_that_was_asked_for() -> None:
    base = nn.Linear(400, 300)
    kaiming = LoraLinear.from_base(base, 50).lora_A.weight
    assert kaiming.abs().max() <= 1 / math.sqrt(400)
    assert kaiming.std().item() == pytest.approx(1 / math.sqrt(3 * 400), rel=0.05)
    assert LoraLinear.from_base(base, 50, init_lora_weights="gaussian").lora_A.weight.std().item() == pytest.approx(
        1 / 50, rel=0.05
    )
    assert LoraLinear.from_base(base, 50, init_lora_weights=False).lora_B.weight.std() > 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_the_base_is_carried_over_as_it_is_and_frozen(kind: str) -> None:
    base = make_base(kind)
    before = bits(base)
    layer = _lora(base)
    assert layer.base_layer is base
    assert bits(base) == before
    assert layer.bias is base.bias
    assert (layer.in_features, layer.out_features, layer.r) == (IN, OUT, RANK)
    assert layer.scaling == SCALING
    trained = {name for name, parameter in layer.named_parameters() if parameter.requires_grad}
    assert trained == {"lora_A.weight", "lora_B.weight"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_a_narrow_base_keeps_its_type_in_the_weight_and_the_output(kind: str, dtype: torch.dtype) -> None:
    layer = _lora(make_base(kind, dtype=dtype))
    x = torch.randn(5, IN, dtype=dtype)
    assert layer.base_layer.weight.dtype == dtype
    assert layer.lora_A.weight.dtype == layer.lora_B.weight.dtype == torch.float32
    found = layer(x)
    assert found.dtype == dtype
    wide = copy.deepcopy(layer).float()
    torch.testing.assert_close(found.float(), wide(x.float()), rtol=2e-2, atol=5e-2)
    layer.merge()
    assert layer(x).dtype == dtype
    torch.testing.assert_close(layer(x).float(), wide(x.float()), rtol=2e-2, atol=1e-1)


def test_the_adapter_goes_to_the_device_of_the_base() -> None:
    layer = LoraLinear.from_base(nn.Linear(IN, OUT, device="meta"), RANK)
    assert {parameter.device.type for parameter in layer.parameters()} == {"meta"}


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("kind", ["linear", "nf4", "int8"])
def test_a_base_with_or_without_bias_computes_the_same_merged_and_not(kind: str, bias: bool) -> None:
    layer = _lora(make_base(kind, bias=bias))
    assert (layer.bias is not None) == bias
    x = torch.randn(5, IN)
    expected = _explicit(layer, x)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
    layer.merge()
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_a_and_b_and_the_input_are_those_of_the_formula(kind: str) -> None:
    layer = _lora(make_base(kind))
    x, up = torch.randn(2, 3, IN, requires_grad=True), torch.randn(2, 3, OUT)
    layer(x).backward(up)
    a, b = layer.lora_A.weight.detach(), layer.lora_B.weight.detach()
    rows, ups = x.detach().reshape(-1, IN), up.reshape(-1, OUT)
    tolerance = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(layer.lora_A.weight.grad, SCALING * b.t() @ ups.t() @ rows, **tolerance)
    torch.testing.assert_close(layer.lora_B.weight.grad, SCALING * ups.t() @ rows @ a.t(), **tolerance)
    weight = quantized_weight(layer.base_layer).dequantize() + SCALING * b @ a
    torch.testing.assert_close(x.grad, up @ weight, **tolerance)
    assert all(parameter.grad is None for parameter in layer.base_layer.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_merge_gives_the_dequantized_base_plus_the_update_and_computes_the_same(kind: str) -> None:
    layer = _lora(make_base(kind))
    x = torch.randn(5, IN)
    before = layer(x)
    update = SCALING * (layer.lora_B.weight @ layer.lora_A.weight)
    expected = quantized_weight(layer.base_layer).dequantize() + update
    layer.merge()
    assert layer.merged
    torch.testing.assert_close(layer.merged_weight(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(layer(x), F.linear(x, expected, layer.bias), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer(x), before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_unmerge_restores_every_bit_even_after_many_rounds(kind: str, dtype: torch.dtype) -> None:
    layer = _lora(make_base(kind, dtype=dtype))
    x = torch.randn(5, IN).to(dtype)
    before, output = bits(layer), layer(x)
    for _ in range(3):
        layer.merge()
        layer.merge()  # a second merge must not add the update twice
        merged = layer(x)
        layer.unmerge()
    assert not torch.equal(merged, layer.base_layer(x))
    assert not layer.merged
    assert bits(layer) == before
    assert torch.equal(layer(x), output)


@pytest.mark.parametrize("kind", KINDS)
def test_merge_weights_merges_on_eval_and_unmerges_on_train(kind: str) -> None:
    layer = _lora(make_base(kind), merge_weights=True)
    before = bits(layer)
    assert not layer.merged
    assert layer.eval().merged
    assert layer.train() is layer
    assert not layer.merged
    assert bits(layer) == before
    plain = _lora(make_base(kind)).eval()
    assert not plain.merged


def test_what_was_trained_between_two_evaluations_is_in_the_second_merge() -> None:
    layer = _lora(make_base("linear"), merge_weights=True).eval()
    layer.train()
    with torch.no_grad():
        layer.lora_B.weight.mul_(3)
    x = torch.randn(5, IN)
    torch.testing.assert_close(layer.eval()(x), _explicit(layer, x), rtol=1e-5, atol=1e-5)


def test_moving_a_merged_layer_moves_its_merged_weight() -> None:
    layer = _lora(make_base("linear"))
    layer.merge()
    assert layer.to(torch.float64)(torch.randn(5, IN, dtype=torch.float64)).dtype == torch.float64
    assert layer._merged.dtype == torch.float64


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_acts_in_training_only_and_on_the_branch_only(kind: str) -> None:
    layer = _lora(make_base(kind), lora_dropout=0.5)
    x = torch.randn(400, IN)
    base = layer.base_layer(x)
    torch.manual_seed(3)
    kept = F.dropout(x, 0.5)
    torch.manual_seed(3)
    expected = base + SCALING * (kept @ layer.lora_A.weight.t() @ layer.lora_B.weight.t())
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
    layer.eval()
    torch.testing.assert_close(layer(x) - layer.base_layer(x), F.linear(x, layer.delta_weight()), rtol=1e-4, atol=1e-4)


def test_what_is_no_linear_layer_is_refused() -> None:
    with pytest.raises(TypeError, match="Embedding"):
        LoraLinear.from_base(nn.Embedding(3, 4), RANK)


@pytest.mark.skipif(
    not bnb.functional.has_avx512bf16(), reason="bitsandbytes repacks only on a processor with AVX512-BF16"
)
def test_a_base_that_bitsandbytes_would_repack_keeps_its_codes_through_an_eval_forward() -> None:
    layer = _lora(bnb.nn.Linear4bit(128, OUT, quant_type="nf4").to("cpu")).eval()
    before = bits(layer.base_layer)
    with torch.no_grad():
        layer(torch.randn(5, 128))
    assert bits(layer.base_layer) == before
    assert quantized_weight(layer.base_layer).shape == (OUT, 128)


@pytest.mark.parametrize("setting", ["use_dora", "lora_bias"])
@pytest.mark.parametrize("kind", KINDS)
def test_dora_and_a_bias_of_b_start_from_the_base_and_merge_exactly(kind: str, setting: str) -> None:
    base = make_base(kind)
    x = torch.randn(2, 3, IN)
    before = base(x)
    fresh = LoraLinear.from_base(base, RANK, ALPHA, **{setting: True})  # type: ignore[arg-type]
    torch.testing.assert_close(fresh(x), before, rtol=1e-5, atol=1e-5)
    layer = _lora(make_base(kind), **{setting: True})
    vector = layer.lora_magnitude_vector if setting == "use_dora" else layer.lora_B.bias
    assert vector is not None
    with torch.no_grad():
        vector.mul_(1 + torch.rand_like(vector)) if setting == "use_dora" else nn.init.normal_(vector)
    live = layer.eval()(x)
    layer.merge()
    if kind != "int8":  # bitsandbytes' own product rounds its input
        torch.testing.assert_close(layer(x), live, rtol=1e-4, atol=1e-4)
    layer.unmerge()
    assert torch.equal(layer(x), live)
    layer.active = False
    assert torch.equal(layer(x), layer.base_layer(x))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("kind", ["linear", "conv1d", "nf4"])
def test_the_gradients_of_a_dora_are_pefts(kind: str, dropout: float) -> None:
    base = make_base(kind)
    ours = _lora(base, use_dora=True, lora_dropout=dropout).train()
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, use_dora=True, lora_dropout=dropout, target_modules=["0"])
    config.fan_in_fan_out = kind == "conv1d"
    theirs = peft.get_peft_model(nn.Sequential(copy.deepcopy(base)), config).base_model.model[0].train()
    with torch.no_grad():
        assert ours.lora_magnitude_vector is not None
        ours.lora_magnitude_vector.mul_(1 + torch.rand(OUT))
        theirs.lora_A["default"].weight.copy_(ours.lora_A.weight)
        theirs.lora_B["default"].weight.copy_(ours.lora_B.weight)
        theirs.lora_magnitude_vector["default"].weight.copy_(ours.lora_magnitude_vector)
    x = torch.randn(5, IN)
    outputs = []
    for layer in (ours, theirs):
        torch.manual_seed(3)
        outputs.append(layer(x))
        outputs[-1].square().sum().backward()
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-4, atol=1e-4)
    for mine, other in (
        (ours.lora_A.weight, theirs.lora_A["default"].weight),
        (ours.lora_B.weight, theirs.lora_B["default"].weight),
        (ours.lora_magnitude_vector, theirs.lora_magnitude_vector["default"].weight),
    ):
        assert mine.grad is not None
        assert mine.grad.abs().max() > 1e-2
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-3, atol=1e-3)
