"""Rounding and dequantizing weights in C: the bits of the torch path, on every shape and with the oddest values."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec, TypeVar

import pytest
import torch

from lora_deploy.errors import InputError, UsageError
from lora_deploy.native import build, weights
from lora_deploy.native.weights import WeightKernels, kernels_for, weight_kernels
from lora_deploy.quantization import QuantizationScheme, quantize
from lora_deploy.quantization.affine import AffineWeight
from lora_deploy.quantization.weight import Blockwise4BitWeight
from lora_deploy.requantize.gram import Gram
from lora_deploy.requantize.rounding import _fit_in_torch, fit_scales, pack_plain, round_plain, round_with_feedback

BITS, BLOCKS = (4, 8), (16, 32, 48, 64, 128, 256)
TYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = ((1, 16), (1, 1), (3, 35), (2, 256), (2, 300), (7, 129))
quantize_module = importlib.import_module("lora_deploy.quantization.quantize")  # its function hides it
P, T = ParamSpec("P"), TypeVar("T")


@pytest.fixture(scope="module", autouse=True)
def kernels() -> WeightKernels:
    weights._load_kernels.cache_clear()  # another test may have asked where there was no room for them
    try:
        return WeightKernels(str(build.load_weights()))
    except UsageError as error:
        pytest.skip(f"no kernels here: {error.summary}")


def _in_torch(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """What a machine without a C compiler gives."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights, "weight_kernels", lambda: None)
        patch.setattr(quantize_module, "weight_kernels", lambda: None)
        return function(*args, **kwargs)


def _same_bits(found: torch.Tensor, expected: torch.Tensor) -> bool:
    as_bytes = [side.contiguous().view(-1).view(torch.uint8) for side in (found, expected)]
    return (found.dtype, found.shape) == (expected.dtype, expected.shape) and torch.equal(*as_bytes)


def _values(kind: str, shape: tuple[int, int]) -> torch.Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(shape[1])) * 0.05
    if kind == "zeros":
        values[:, ::2], values[:, 1::2], values[-1] = 0, -0.0, -0.0
    elif kind == "gaps":
        values *= (values > 0.02).float()
    elif kind == "subnormal":
        values *= 1e-38
    elif kind == "small":  # a scale in float16 becomes zero
        values *= 1e-6
    elif kind == "large":  # some scales in float16 become infinite
        values *= 3e6
    elif kind == "huge":  # squares overflow in float32
        values *= 1e25
    elif kind == "ties":
        values = (values * 40).round_() / 2
    elif kind in ("nan", "inf"):
        values[-1, -1] = float(kind)
    return values


KINDS = ("normal", "zeros", "gaps", "subnormal", "small", "large", "huge", "ties", "nan", "inf")


def _outcome(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | str:
    try:
        return function(*args, **kwargs)
    except InputError as error:
        return str(error)


@pytest.mark.parametrize("scale_dtype", TYPES, ids=str)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("kind", KINDS)
def test_scales_and_codes_have_the_bits_of_torch(kind: str, bits: int, scale_dtype: torch.dtype) -> None:
    outcomes = set()
    for shape, blocksize in itertools.product(SHAPES, BLOCKS):
        values = _values(kind, shape)
        ask = (values, bits, blocksize, scale_dtype)
        found, expected = _outcome(round_plain, *ask), _in_torch(_outcome, round_plain, *ask)
        packed, in_torch = _outcome(pack_plain, *ask), _in_torch(_outcome, pack_plain, *ask)
        outcomes.add(type(found))
        if isinstance(expected, str):
            assert found == packed == in_torch == expected
            continue
        assert isinstance(found, AffineWeight)
        assert isinstance(expected, AffineWeight)
        assert _same_bits(found.scales, expected.scales)
        assert _same_bits(found.codes, expected.codes)
        assert _same_bits(found.dequantize(), _in_torch(expected.dequantize))
        for codes, scales in (packed, in_torch, (found.packed(), found.scales)):
            assert _same_bits(codes, _in_torch(expected.packed))
            assert _same_bits(scales, expected.scales)
    if kind in ("nan", "inf"):
        assert outcomes == {str}
    elif kind == "huge":  # a weight that is alone loses nothing, which does not overflow
        assert str in outcomes
    elif kind not in ("small", "large", "subnormal"):
        assert outcomes == {AffineWeight}


@pytest.mark.parametrize("scale_dtype", TYPES, ids=str)
@pytest.mark.parametrize("bits", BITS)
def test_scales_with_importance_have_the_bits_of_torch(bits: int, scale_dtype: torch.dtype) -> None:
    for shape, blocksize in itertools.product(SHAPES, BLOCKS):
        values, importance = _values("normal", shape), _values("gaps", shape)[0].abs()
        found = fit_scales(values, importance, bits, blocksize, scale_dtype)
        assert _same_bits(found, _in_torch(fit_scales, values, importance, bits, blocksize, scale_dtype))


@pytest.mark.parametrize("scale_dtype", TYPES[1:], ids=str)
def test_scales_round_as_torch_casts(kernels: WeightKernels, scale_dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    ties = torch.tensor([65520, 65519.99, 2**-14, 2**-24, 2**-25, 1.5 * 2**-24, 1 + 2**-11, 1 + 3 * 2**-11, 1 + 2**-8])
    wide = torch.randn(4096, generator=generator) * 2.0 ** torch.randint(-30, 17, (4096,), generator=generator)
    # A scale that is tried is the largest of a block / 8: the number itself.
    values = (torch.cat([ties, -ties, wide]) * 8)[:, None] * torch.linspace(1, 0.25, 16)
    found, failed = kernels.fit(values, torch.ones(16), 4, 16, scale_dtype)
    expected, failed_in_torch = _fit_in_torch(values, torch.ones(16), 4, 16, scale_dtype)
    assert failed == failed_in_torch
    assert _same_bits(found, expected)
    assert len(found.unique()) > 1000


def test_feedback_gives_the_same_bytes_without_a_compiler() -> None:
    values, inputs = _values("normal", (7, 70)), _values("normal", (128, 70))
    gram = Gram(inputs.t() @ inputs, inputs.t() @ inputs * 1.1)
    wanted = gram.target(values)
    found = round_with_feedback(wanted, gram, 4, 32)
    expected = _in_torch(round_with_feedback, wanted, gram, 4, 32)
    assert _same_bits(found.scales, expected.scales)
    assert _same_bits(found.codes, expected.codes)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("method", ["nf4", "fp4", "int8"])
def test_stored_codes_are_dequantized_to_the_bits_of_torch(method: str, dtype: torch.dtype) -> None:
    for shape, blocksize, kind in itertools.product(SHAPES, (32, 64, 4096), ("normal", "zeros", "subnormal", "large")):
        if method == "int8" and kind == "large":
            continue
        weight = quantize(_values(kind, shape), QuantizationScheme(method=method, blocksize=blocksize))
        assert _same_bits(weight.dequantize(dtype), _in_torch(weight.dequantize, dtype))


@pytest.mark.parametrize("blocksize", [1, 3, 7, 40])
def test_blocks_that_begin_in_the_middle_of_a_byte(blocksize: int) -> None:
    codes, absmax = torch.arange(250).to(torch.uint8), torch.rand(-(-499 // blocksize)) - 0.5
    weight = Blockwise4BitWeight(codes, absmax, (1, 499), "nf4", blocksize)
    assert _same_bits(weight.dequantize(), _in_torch(weight.dequantize))


def test_scales_that_are_not_finite_stay_what_they_are() -> None:
    absmax = torch.tensor([torch.inf, -torch.inf, torch.nan, 3e38])
    weight = Blockwise4BitWeight(torch.arange(128).to(torch.uint8), absmax, (4, 64), "fp4", 64)
    expected = _in_torch(weight.dequantize)
    torch.testing.assert_close(weight.dequantize(), expected, rtol=0, atol=0, equal_nan=True)
    assert bool(expected.isnan().any())


def test_threads_share_a_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    values = _values("normal", (37, 129))
    stored = quantize(values, QuantizationScheme(method="nf4"))
    eight = quantize(values, QuantizationScheme(method="int8"))
    whole = round_plain(values, 4, 32)
    expected = [whole.dequantize(), whole.packed(), stored.dequantize(), eight.dequantize()]
    monkeypatch.setattr(weights, "_SHARE", 100)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    shared = round_plain(values, 4, 32)
    assert _same_bits(shared.scales, whole.scales)
    assert _same_bits(shared.codes, whole.codes)
    found = [shared.dequantize(), shared.packed(), stored.dequantize(), eight.dequantize()]
    assert all(map(_same_bits, found, expected))


def test_the_oldest_instruction_set_gives_the_same_bits(
    kernels: WeightKernels, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build, "_WEIGHTS", (*build._WEIGHTS, "-DCLONES="))
    oldest = WeightKernels(str(build.load_weights()))
    for bits, blocksize in itertools.product(BITS, BLOCKS):
        values = _values("normal", (3, 300))
        scales, failed = oldest.fit(values, torch.ones(300), bits, blocksize, torch.float16)
        assert failed == 0
        assert _same_bits(scales, kernels.fit(values, torch.ones(300), bits, blocksize, torch.float16)[0])
        codes = oldest.quantize(values, scales, bits, blocksize, packed=True)
        assert _same_bits(codes, kernels.quantize(values, scales, bits, blocksize, packed=True))


def test_tensors_that_c_cannot_read_go_to_torch() -> None:
    values = _values("normal", (64, 64))
    assert kernels_for(values) is not None
    assert kernels_for(values.t()) is None
    assert kernels_for(values.half()) is None
    assert kernels_for(values.to("meta")) is None
    turned = round_plain(values.t(), 4, 32)
    assert _same_bits(turned.codes, round_plain(values.t().contiguous(), 4, 32).codes)
    assert _same_bits(round_plain(values, 8, 512).codes, _in_torch(round_plain, values, 8, 512).codes)
    half = quantize(values, QuantizationScheme(method="nf4"))
    assert isinstance(half, Blockwise4BitWeight)
    scaled = Blockwise4BitWeight(half.codes, half.absmax.half(), half.shape, "nf4", half.blocksize)
    assert _same_bits(scaled.dequantize(), _in_torch(scaled.dequantize))


def test_sizes_and_types_are_checked_before_c_reads(kernels: WeightKernels) -> None:
    values, ones = _values("normal", (4, 64)), torch.ones(64)
    scales, _ = kernels.fit(values, ones, 4, 32, torch.float32)
    codes = kernels.quantize(values, scales, 4, 32, packed=False)
    wrong: list[Callable[[], object]] = [
        lambda: kernels.fit(values, ones[:63], 4, 32, torch.float32),
        lambda: kernels.fit(values.t(), ones[:4], 4, 32, torch.float32),
        lambda: kernels.fit(values.double(), ones, 4, 32, torch.float32),
        lambda: kernels.fit(values, ones, 5, 32, torch.float32),
        lambda: kernels.fit(values, ones, 4, 512, torch.float32),
        lambda: kernels.quantize(values, scales[:3], 4, 32, packed=True),
        lambda: kernels.pack(codes[:, :63]),
        lambda: kernels.dequantize(codes, scales, 100, 32, 4),
        lambda: kernels.dequantize_rows(codes.view(torch.int8), ones[:3]),
        lambda: kernels.dequantize_4bit(codes.view(-1), ones, torch.zeros(256, 2), 128, 64),
    ]
    for call in wrong:
        with pytest.raises(ValueError, match=r"blocks of|bits|in a row"):
            call()


def test_without_a_compiler_there_are_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    values = _values("normal", (5, 70))
    expected = round_plain(values, 4, 32)
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: None)
    weights._load_kernels.cache_clear()
    try:
        assert weight_kernels() is None
        found = round_plain(values, 4, 32)
        assert _same_bits(found.codes, expected.codes)
        assert _same_bits(found.packed(), expected.packed())
    finally:
        weights._load_kernels.cache_clear()


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("scheme", ["nf4", "fp4"])
def test_4bit_codes_and_absmax_are_those_of_torch(scheme: str, dtype: torch.dtype) -> None:
    for kind, shape, blocksize in itertools.product(KINDS, SHAPES, (32, 64, 4096)):
        values = _values(kind, shape).to(dtype)
        asked = QuantizationScheme(method=scheme, blocksize=blocksize, double_quant=False)
        found, expected = quantize(values, asked), _in_torch(quantize, values, asked)
        assert isinstance(found, Blockwise4BitWeight)
        assert isinstance(expected, Blockwise4BitWeight)
        assert _same_bits(found.codes, expected.codes), (kind, shape, blocksize)
        torch.testing.assert_close(found.absmax, expected.absmax, rtol=0, atol=0, equal_nan=True)
