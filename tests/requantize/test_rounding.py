"""Rounding to the grid: against brute force, against plain rounding, and on shapes that do not fit the blocks."""

from __future__ import annotations

import itertools

import pytest
import torch

from lora_deploy.quantization.affine import AffineWeight, round_to_nearest
from lora_deploy.requantize.correction import round_with_correction
from lora_deploy.requantize.gram import Gram
from lora_deploy.requantize.rounding import fit_scales, round_plain, round_with_feedback


def _inputs(columns: int, rows: int = 512, seed: int = 0) -> torch.Tensor:
    """Correlated inputs, some columns of which are much larger than others."""
    chance = torch.Generator().manual_seed(seed)
    mixed = torch.randn(rows, columns, generator=chance) @ torch.randn(columns, columns, generator=chance)
    return mixed * torch.logspace(-1, 1, columns)[torch.randperm(columns, generator=chance)] / columns**0.5


def _weight(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(1)) * 0.05


def _loss(found: torch.Tensor, wanted: torch.Tensor, inputs: torch.Tensor) -> float:
    return float(((found - wanted) @ inputs.t()).square().sum())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("rows", "columns", "blocksize"), [(24, 64, 32), (17, 100, 32), (5, 35, 16), (40, 48, 64)])
def test_feedback_loses_less_of_the_output_than_rounding_each_weight(
    bits: int, rows: int, columns: int, blocksize: int
) -> None:
    inputs, weight = _inputs(columns), _weight(rows, columns)
    found = round_with_feedback(weight, Gram(inputs.t() @ inputs), bits, blocksize)
    plain = round_plain(weight, bits, blocksize)
    assert found.dequantize().shape == plain.dequantize().shape == weight.shape
    assert _loss(found.dequantize(), weight, inputs) < 0.6 * _loss(plain.dequantize(), weight, inputs)


@pytest.mark.parametrize("bits", [4, 8])
def test_fitted_scales_lose_less_than_those_of_the_largest_weight(bits: int) -> None:
    weight = _weight(64, 256)
    plain, nearest = round_plain(weight, bits, 32).dequantize(), round_to_nearest(weight, bits, 32).dequantize()
    # In 8 bits the one code more on one side is next to nothing.
    assert (plain - weight).square().sum() < (0.9 if bits == 4 else 1.0) * (nearest - weight).square().sum()


def test_scales_are_the_best_of_those_that_are_tried() -> None:
    block = torch.tensor([[0.9, -0.2, 0.31, 0.05] * 4])
    importance = torch.ones(16)
    scale = float(fit_scales(block, importance, 4, 16))

    def error(candidate: float) -> float:
        codes = (block / candidate).round().clamp(-8, 7)
        return float((codes * candidate - block).square().sum())

    assert scale < 0  # the largest weight is positive, and -8 reaches further than 7
    tried = [-0.9 / 8 * factor for factor in (1.06, 1.0, 0.94, 0.88, 0.82, 0.76, 0.7)] + [0.9 / 7]
    assert error(scale) == pytest.approx(min(map(error, tried)))


def test_uncorrelated_inputs_leave_every_weight_to_itself() -> None:
    weight = _weight(8, 32)
    found = round_with_feedback(weight, Gram(torch.eye(32)), 4, 32)
    assert torch.equal(found.codes, round_plain(weight, 4, 32).codes)


def test_feedback_is_near_the_best_codes_that_there_are() -> None:
    inputs = _inputs(16)[:, :3] @ torch.eye(3, 16)  # all but three inputs are always zero
    weight = torch.zeros(1, 16)
    weight[0, :3] = torch.tensor([0.5, -0.31, 0.123])
    found = round_with_feedback(weight, Gram(inputs.t() @ inputs), 4, 16)
    scale = float(found.scales[0, 0])
    best = min(
        _loss(torch.tensor([[*codes, *[0.0] * 13]]) * scale, weight, inputs)
        for codes in itertools.product(range(-8, 8), repeat=3)
    )
    assert _loss(found.dequantize(), weight, inputs) <= 2.5 * best + 1e-6


def test_a_layer_makes_up_for_what_its_input_has_lost() -> None:
    full = _inputs(64)
    lost = full + 0.1 * _inputs(64, seed=3)
    weight = _weight(24, 64)
    gram = Gram(lost.t() @ lost, full.t() @ lost)
    wanted = full @ weight.t()

    def error(found: torch.Tensor) -> float:
        return float((lost @ found.t() - wanted).square().sum())

    with_cross = round_with_feedback(gram.target(weight), gram, 4, 32).dequantize()
    without = round_with_feedback(weight, gram, 4, 32).dequantize()
    assert error(gram.target(weight)) < error(weight)
    assert error(with_cross) < error(without)


@pytest.mark.parametrize("shape", [(24, 64), (64, 24), (33, 70)])
def test_a_correction_takes_back_what_it_can(shape: tuple[int, int]) -> None:
    inputs, weight = _inputs(shape[1]), _weight(*shape)
    gram = Gram(inputs.t() @ inputs)
    losses = []
    for rank in (1, 4, 16):
        rounded, update = round_with_correction(weight, gram, 4, 32, torch.float32, rank)
        assert update.A.shape == (rank, shape[1])
        assert update.B.shape == (shape[0], rank)
        losses.append(_loss(rounded.dequantize() + update.delta_weight(), weight, inputs))
    alone = _loss(round_with_feedback(weight, gram, 4, 32).dequantize(), weight, inputs)
    assert alone > losses[0] > losses[1] > losses[2]
    assert losses[2] < 0.3 * alone


def test_the_correction_of_full_rank_is_exact() -> None:
    inputs, weight = _inputs(12), _weight(8, 12)
    rounded, update = round_with_correction(weight, Gram(inputs.t() @ inputs), 4, 16, torch.float32, 99)
    torch.testing.assert_close(rounded.dequantize() + update.delta_weight(), weight, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scales_are_of_the_type_that_they_are_stored_in(dtype: torch.dtype) -> None:
    inputs, weight = _inputs(64), _weight(8, 64)
    for found in (
        round_plain(weight, 4, 32, dtype),
        round_with_feedback(weight, Gram(inputs.t() @ inputs), 4, 32, dtype),
    ):
        assert torch.equal(found.scales, found.scales.to(dtype).float())


@pytest.mark.parametrize("bits", [4, 8])
def test_blocks_of_zeros_and_dead_inputs(bits: int) -> None:
    weight = _weight(6, 64)
    weight[:, :32] = 0
    weight[2] = 0
    dead = torch.zeros(64, 64)
    for found in (round_plain(weight, bits, 32), round_with_feedback(weight, Gram(dead), bits, 32)):
        values = found.dequantize()
        assert torch.equal(values[:, :32], torch.zeros(6, 32))
        assert torch.equal(values[2], torch.zeros(64))
        assert bool(torch.isfinite(found.scales).all())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("columns", [64, 35])
def test_packed_codes_read_back(bits: int, columns: int) -> None:
    weight = round_plain(_weight(5, columns), bits, 16)
    packed = weight.packed()
    assert packed.numel() == 5 * -(-columns // 16) * 16 * bits // 8
    again = AffineWeight.from_packed(packed, weight.scales, (5, columns), 16, bits)
    assert torch.equal(again.codes, weight.codes)
    assert torch.equal(again.dequantize(), weight.dequantize())
