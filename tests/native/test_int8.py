"""lora_deploy's MatMulInt8 against torch, on every path that this processor has."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from onnxruntime.capi.onnxruntime_pybind11_state import InvalidArgument

from lora_deploy.quantization.weight import Int8Weight
from tests.native.graphs import assert_close, one_node, run, session

Make = Callable[..., Any]

# Whole groups of 32 columns, and not; less than a tile or a panel; one row; several tasks.
SHAPES = [(70, 576), (33, 192), (5, 32), (1, 64), (17, 33), (9, 7), (1, 1), (130, 257), (40, 48), (300, 640), (3, 4096)]
ROWS = (1, 2, 3, 4, 7, 8, 25, 33, 130)


@pytest.fixture
def make(kernels: str, path: int) -> Make:
    """Makes a session of one node that takes this path."""
    return partial(_session, kernels=kernels, path=path)


def _weight(shape: tuple[int, int]) -> Int8Weight:
    codes = torch.randint(-128, 128, shape, dtype=torch.int8)
    codes[-1, -1] = -128
    return Int8Weight(codes, torch.rand(shape[0]) * 20 + 0.1)  # no two alike: the wrong row shows


def _session(weight: Int8Weight, kernels: str, rank: int = 2, **attributes: int) -> Any:
    rows, columns = weight.shape
    constants = {"B": weight.codes.numpy(), "scale": (weight.row_absmax / 127).numpy()}
    return session(one_node("MatMulInt8", constants, {"K": columns, "N": rows} | attributes, rank=rank), kernels)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_are_those_of_the_dequantized_weights(make: Make, shape: tuple[int, int]) -> None:
    weight = _weight(shape)
    node = make(weight)
    for rows in ROWS:
        x = np.random.default_rng(rows).standard_normal((rows, shape[1]), np.float32)
        assert_close(run(node, x), x, weight.dequantize())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_unit_vectors_give_the_dequantized_weights_bit_for_bit(make: Make, shape: tuple[int, int]) -> None:
    weight = _weight(shape)
    node = make(weight)
    expected = weight.dequantize().numpy().T
    unit = np.eye(shape[1], dtype=np.float32)
    assert np.array_equal(run(node, unit), expected)
    for rows in (1, 2, 3, 4):
        for start in (*range(0, min(shape[1], 40), rows), shape[1] - 1):
            part = slice(start, start + rows)
            assert np.array_equal(run(node, unit[part]), expected[part])


@pytest.mark.parametrize("lead", [(), (2, 3), (0,), (5, 1, 9)], ids=str)
def test_batch_dimensions_are_kept(make: Make, lead: tuple[int, ...]) -> None:
    weight = _weight((70, 192))
    x = np.random.default_rng(0).standard_normal((*lead, 192), np.float32)
    assert_close(run(make(weight, rank=len(lead) + 1), x), x, weight.dequantize())


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"N": 5}, "MatMulInt8: B has 256 bytes, not 320"),
        ({"N": 3}, "B has 256 bytes, not 192"),
        ({"K": 128, "N": 2}, "the last dimension of A is 64, not K = 128"),
    ],
    ids=str,
)
@pytest.mark.parametrize("rows", [0, 1, 40])
def test_sizes_that_do_not_fit_are_an_error_and_no_crash(
    kernels: str, attributes: dict[str, int], message: str, rows: int
) -> None:
    node = _session(_weight((4, 64)), kernels, **attributes)
    with pytest.raises(InvalidArgument, match=message):
        run(node, np.ones((rows, 64), np.float32))


def test_a_scale_is_needed_for_every_row(kernels: str) -> None:
    weight = _weight((4, 64))
    node = _session(Int8Weight(weight.codes, weight.row_absmax[:3]), kernels)
    with pytest.raises(InvalidArgument, match="scale has 3 values, not 4"):
        run(node, np.ones((1, 64), np.float32))
