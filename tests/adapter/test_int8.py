"""A and B as int8 codes: which blocks, how far from the floats, and nothing lost to a neighbour."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lora_deploy.adapter.int8 import choose_blocks, dequantize, join_blocks, quantize_a, quantize_b


@pytest.mark.parametrize(
    ("inputs", "widths", "expected"),
    [
        (576, [576, 192, 192], (32, 32)),
        (1536, [576], (32, 32)),
        (48, [48], (16, 16)),
        (112, [112, 112], (16, 16)),
        (64, [64, 48], (32, 16)),
        (64, [64, 40], (32, 104)),
        (36, [101], (36, 101)),
        (8, [8], (8, 8)),
    ],
    ids=str,
)
def test_blocks_divide_the_width_or_are_all_of_it(inputs: int, widths: list[int], expected: tuple[int, int]) -> None:
    assert choose_blocks(inputs, widths) == expected


def test_the_values_are_those_of_the_rule_written_out_one_by_one() -> None:
    values = torch.randn(96, 3, generator=torch.Generator().manual_seed(0))
    codes_a, scales_a = quantize_a(values, 32)
    codes_b, scales_b = quantize_b(values.t(), 32)
    assert (codes_a.shape, scales_a.shape) == ((3, 32, 3), (3, 1, 3))
    assert (codes_b.shape, scales_b.shape) == ((3, 3, 32), (3, 3, 1))
    assert codes_a.dtype == codes_b.dtype == torch.int8
    for rank in range(3):
        for block in range(3):
            part = values[block * 32 : block * 32 + 32, rank].numpy()
            scale = np.abs(part).max() / np.float32(127)
            assert scales_a[block, 0, rank] == scales_b[rank, block, 0] == scale
            expected = np.rint(part / scale)
            assert np.array_equal(codes_a[block, :, rank].numpy(), expected)
            assert np.array_equal(codes_b[rank, block].numpy(), expected)
            assert np.abs(expected).max() == 127


@pytest.mark.parametrize("block", [16, 32, 96])
def test_no_value_is_off_by_more_than_half_a_step_of_its_own_block(block: int) -> None:
    values = torch.randn(96, 5, generator=torch.Generator().manual_seed(1))
    a, b = join_blocks(dequantize(*quantize_a(values, block)), dequantize(*quantize_b(values.t(), block)))
    assert torch.equal(a, b.t())
    steps = values.view(96 // block, block, 5).abs().amax(1, keepdim=True) / 127
    off = (a - values).view(96 // block, block, 5).abs()
    assert bool((off <= steps * 0.5001).all())
    assert float((off / steps).max()) > 0.45


def test_large_values_cost_neither_the_next_block_nor_the_next_rank_anything() -> None:
    values = torch.randn(2, 96, generator=torch.Generator().manual_seed(2))
    alone = dequantize(*quantize_b(values, 32))
    values[1] *= 1e6
    values[0, 64:] *= 1e6
    assert torch.equal(dequantize(*quantize_b(values, 32))[0, :2], alone[0, :2])


@pytest.mark.parametrize("tiny", [0.0, 1e-45, 1e-44])
def test_a_block_without_values_is_exactly_zero(tiny: float) -> None:
    """Also where the scale is below the smallest float."""
    values = torch.ones(2, 64)
    values[0, 32:] = tiny
    codes, scales = quantize_b(values, 32)
    assert scales[0, 1] == 0
    assert not codes[0, 1].any()
    found = dequantize(codes, scales)
    assert bool(torch.isfinite(found).all())
    assert float((found[1] - 1).abs().max()) < 1e-6


def test_codes_stay_within_127_where_the_scale_itself_is_rounded() -> None:
    values = torch.tensor([[1.9e-43, -1.9e-43, 1e-43, 0.0] * 8])  # 135 steps of the smallest float
    codes, _ = quantize_b(values, 32)
    assert codes.min() == -127
    assert codes.max() == 127


def test_what_is_not_finite_stays_visible() -> None:
    for value in (float("nan"), float("inf")):
        values = torch.ones(1, 32)
        values[0, 3] = value
        assert not torch.isfinite(dequantize(*quantize_b(values, 32))).all()


def test_a_rank_of_zero_is_fine() -> None:
    codes_a, scales_a = quantize_a(torch.zeros(64, 0), 32)
    codes_b, scales_b = quantize_b(torch.zeros(0, 48), 16)
    assert (codes_a.shape, scales_a.shape) == ((2, 32, 0), (2, 1, 0))
    assert (codes_b.shape, scales_b.shape) == ((0, 3, 16), (0, 3, 1))
    assert codes_a.dtype == codes_b.dtype == torch.int8
