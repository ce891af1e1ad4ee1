"""Codes and values against bitsandbytes' own modules and kernels, bit for bit."""

from __future__ import annotations

import bitsandbytes as bnb
import pytest
import torch

from lora_deploy.codes import FP4_CODE, NF4_CODE
from lora_deploy.quantization import QuantizationScheme, quantize, quantized_weight
from lora_deploy.quantization.quantize import _PIECE
from lora_deploy.quantization.weight import DenseWeight
from tests.conftest import assert_same_weight

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Odd counts, less than a block, blocks that cross rows, more than one nested block of 256 absmax values.
SHAPES = [(7, 5), (1, 64), (33, 70), (96, 64), (24, 112), (130, 257)]


def _weight(shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    weight = torch.randn(shape)
    weight[0] *= 30  # absmax values of different sizes
    return weight.to(dtype)


def _bnb_4bit(weight: torch.Tensor, kind: str, blocksize: int, double_quant: bool) -> bnb.nn.Linear4bit:
    layer = bnb.nn.Linear4bit(weight.shape[1], weight.shape[0], bias=False, quant_type=kind)
    layer.weight = bnb.nn.Params4bit(
        weight, requires_grad=False, blocksize=blocksize, compress_statistics=double_quant, quant_type=kind
    )
    return layer.to("cpu")


def _bnb_int8(weight: torch.Tensor) -> bnb.nn.Linear8bitLt:
    layer = bnb.nn.Linear8bitLt(weight.shape[1], weight.shape[0], bias=False, has_fp16_weights=False)
    layer.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    return layer.to("cpu")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("double_quant", [False, True], ids=["single", "double"])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_4bit_codes_and_absmax_are_those_of_a_bitsandbytes_layer(
    kind: str, double_quant: bool, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    weight = _weight(shape, dtype)
    for blocksize in (64, 128):
        ours = quantize(weight, QuantizationScheme(method=kind, blocksize=blocksize, double_quant=double_quant))
        theirs = quantized_weight(_bnb_4bit(weight, kind, blocksize, double_quant))
        assert_same_weight(ours, theirs)
        assert ours.blocksize == theirs.blocksize == blocksize


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_a_weight_larger_than_one_piece_is_quantized_as_in_one_go(kind: str) -> None:
    rows = 2051
    weight = _weight((rows, _PIECE // rows + 40))
    assert weight.numel() > _PIECE
    ours = quantize(weight, QuantizationScheme(method=kind))
    assert_same_weight(ours, quantized_weight(_bnb_4bit(weight, kind, 64, double_quant=True)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_int8_codes_and_scales_are_those_of_a_bitsandbytes_layer(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = _weight(shape, dtype)
    assert_same_weight(quantize(weight, QuantizationScheme(method="int8")), quantized_weight(_bnb_int8(weight)))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("double_quant", [False, True], ids=["single", "double"])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_4bit_values_are_those_that_bitsandbytes_dequantizes(
    kind: str, double_quant: bool, shape: tuple[int, int]
) -> None:
    weight = _weight(shape)
    for blocksize in (64, 128):
        layer = _bnb_4bit(weight, kind, blocksize, double_quant)
        state = layer.weight.quant_state
        # One long row: bitsandbytes' AVX512 kernel takes the wrong absmax where a block crosses into another row.
        state.shape = torch.Size([1, weight.numel()])
        theirs = bnb.functional.dequantize_4bit(layer.weight.data, state).reshape(shape)
        ours = quantize(weight, QuantizationScheme(method=kind, blocksize=blocksize, double_quant=double_quant))
        assert theirs.dtype == torch.float32
        assert torch.equal(ours.dequantize(), theirs)


def test_int8_values_are_codes_times_scale_over_127() -> None:
    weight = _weight((33, 70))
    quantized = quantize(weight, QuantizationScheme(method="int8"))
    layer = _bnb_int8(weight)
    theirs = bnb.functional.int8_vectorwise_dequant(layer.weight.CB, layer.weight.SCB)
    torch.testing.assert_close(quantized.dequantize(), theirs, rtol=1e-6, atol=0)
    half_a_step_and_float16 = 1 / 254 + 2**-10
    assert (
        (quantized.dequantize() - weight).abs() <= weight.abs().amax(1, keepdim=True) * half_a_step_and_float16
    ).all()


@pytest.mark.parametrize("method", ["none", "nf4", "fp4", "int8"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_narrow_dequantization_rounds_the_float32_values_once(method: str, dtype: torch.dtype) -> None:
    quantized = quantize(_weight((33, 70)), QuantizationScheme(method=method))
    assert torch.equal(quantized.dequantize(dtype), quantized.dequantize().to(dtype))


@pytest.mark.parametrize("method", ["none", "nf4", "fp4", "int8"])
def test_dequantize_gives_a_tensor_that_the_caller_may_change(method: str) -> None:
    quantized = quantize(_weight((33, 70)), QuantizationScheme(method=method))
    before = quantized.dequantize()
    quantized.dequantize().add_(1)
    assert torch.equal(quantized.dequantize(), before)


@pytest.mark.parametrize("method", ["none", "nf4", "int8"])
def test_the_weight_dtype_of_the_scheme_is_applied_before_quantizing(method: str) -> None:
    weight = _weight((33, 70)) * 1.001
    ours = quantize(weight, QuantizationScheme(method=method, weight_dtype="bfloat16"))
    assert_same_weight(ours, quantize(weight.bfloat16(), QuantizationScheme(method=method)))
    assert not torch.equal(ours.dequantize(), quantize(weight, QuantizationScheme(method=method)).dequantize())


def test_a_dense_weight_stays_the_very_tensor_it_was() -> None:
    weight = _weight((7, 5))
    quantized = quantize(weight, QuantizationScheme())
    assert isinstance(quantized, DenseWeight)
    assert quantized.values is weight


@pytest.mark.parametrize(("kind", "table"), [("nf4", NF4_CODE), ("fp4", FP4_CODE)])
def test_the_16_values_are_bitsandbytes_own(kind: str, table: tuple[float, ...]) -> None:
    theirs = bnb.functional.get_4bit_type(kind, device="cpu")
    assert torch.equal(torch.tensor(table), theirs)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_the_high_nibble_is_the_even_element(kind: str) -> None:
    one = quantize(torch.tensor([[1.0, 0.0]]), QuantizationScheme(method=kind, double_quant=False))
    assert torch.equal(one.dequantize(), torch.tensor([[1.0, 0.0]]))
    assert one.codes.tolist() == [(15 << 4 | 7) if kind == "nf4" else 3 << 4]
