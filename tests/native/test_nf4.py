"""lora_deploy's MatMulBnb4 against torch and com.microsoft's, on every path that this processor has."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto
from onnxruntime.capi.onnxruntime_pybind11_state import InvalidArgument
from onnxruntime.capi.onnxruntime_pybind11_state import RuntimeException as RefusedAtLoad

from lora_deploy.quantization.weight import Blockwise4BitWeight
from tests.native.graphs import Floats, assert_close, one_node, run, session

Make = Callable[..., Any]

# (N, K), block size: rows of whole blocks; blocks that cross rows; 32 columns that do not share a block; bytes that do
# not either (odd K); less than a block, a tile, a panel; one row; several tasks.
CASES = [
    *[((70, 576), block) for block in (16, 32, 64, 128, 256, 512, 96, 100)],
    *[((33, 192), block) for block in (32, 64, 512, 4096)],
    ((5, 32), 64),
    ((1, 64), 64),
    ((17, 33), 16),
    ((9, 7), 64),
    ((1, 1), 16),
    ((130, 257), 64),
    ((40, 50), 32),
    ((300, 640), 64),
    ((3, 4096), 64),
]
ROWS = (1, 2, 3, 4, 7, 8, 25, 33, 130)


@pytest.fixture
def make(kernels: str, path: int) -> Make:
    """Makes a session of one node that takes this path."""
    return partial(_session, kernels=kernels, path=path)


def _weight(shape: tuple[int, int], scheme: str, block: int) -> Blockwise4BitWeight:
    count = shape[0] * shape[1]
    codes = torch.randint(0, 256, ((count + 1) // 2,), dtype=torch.uint8)
    absmax = torch.rand(-(-count // block)) * 2 + 0.1  # no two alike: the wrong block shows
    return Blockwise4BitWeight(codes, absmax, shape, scheme, block)


def _session(
    weight: Blockwise4BitWeight, kernels: str, domain: str = "lora_deploy", rank: int = 2, **attributes: int
) -> Any:
    rows, columns = weight.shape
    values = {"K": columns, "N": rows, "block_size": weight.blocksize, "quant_type": int(weight.scheme == "nf4")}
    constants = {"B": weight.codes.numpy(), "absmax": weight.absmax.numpy()}
    return session(one_node("MatMulBnb4", constants, values | attributes, domain, rank), kernels)


def _close(actual: Floats, x: Floats, weight: Blockwise4BitWeight) -> None:
    assert_close(actual, x, weight.dequantize())


@pytest.mark.parametrize("scheme", ["nf4", "fp4"])
@pytest.mark.parametrize(("shape", "block"), CASES, ids=str)
def test_products_are_those_of_the_dequantized_weights(
    make: Make, shape: tuple[int, int], block: int, scheme: str
) -> None:
    weight = _weight(shape, scheme, block)
    node = make(weight)
    for rows in ROWS:
        x = np.random.default_rng(rows).standard_normal((rows, shape[1]), np.float32)
        _close(run(node, x), x, weight)


@pytest.mark.parametrize("scheme", ["nf4", "fp4"])
@pytest.mark.parametrize(("shape", "block"), CASES, ids=str)
def test_unit_vectors_give_the_dequantized_weights_bit_for_bit(
    make: Make, shape: tuple[int, int], block: int, scheme: str
) -> None:
    weight = _weight(shape, scheme, block)
    node = make(weight)
    expected = weight.dequantize().numpy().T
    unit = np.eye(shape[1], dtype=np.float32)
    assert np.array_equal(run(node, unit), expected)
    for rows in (1, 2, 3, 4):
        for start in (*range(0, min(shape[1], 40), rows), shape[1] - 1):
            part = slice(start, start + rows)
            assert np.array_equal(run(node, unit[part]), expected[part])


@pytest.mark.parametrize("scheme", ["nf4", "fp4"])
@pytest.mark.parametrize(("shape", "block"), [case for case in CASES if case[1] in (16, 32, 64, 128, 256)], ids=str)
def test_a_graph_is_switched_by_the_domain_of_its_nodes(
    kernels: str, shape: tuple[int, int], block: int, scheme: str
) -> None:
    weight = _weight(shape, scheme, block)
    theirs, ours = _session(weight, kernels, "com.microsoft"), _session(weight, kernels)
    for rows in ROWS:
        x = np.random.default_rng(rows).standard_normal((rows, shape[1]), np.float32)
        scale = np.abs(x) @ weight.dequantize().abs().numpy().T
        assert (np.abs(run(theirs, x) - run(ours, x)) <= 1e-6 * scale).all()


@pytest.mark.parametrize("lead", [(), (2, 3), (1, 2, 2), (0,), (2, 0), (5, 1, 9)], ids=str)
@pytest.mark.parametrize("shape", [(70, 192), (9, 7)], ids=str)
def test_batch_dimensions_are_kept(make: Make, shape: tuple[int, int], lead: tuple[int, ...]) -> None:
    weight = _weight(shape, "nf4", 64)
    x = np.random.default_rng(0).standard_normal((*lead, shape[1]), np.float32)
    _close(run(make(weight, rank=len(lead) + 1), x), x, weight)


@pytest.mark.parametrize("rows", [1, 40])
def test_a_value_that_is_not_finite_stays_in_its_row(make: Make, rows: int) -> None:
    weight = _weight((70, 64), "nf4", 64)
    x = np.random.default_rng(0).standard_normal((rows + 1, 64), np.float32)
    x[-1, 3] = np.inf
    y = run(make(weight), x)
    _close(y[:-1], x[:-1], weight)
    assert not np.isfinite(y[-1]).any()


def test_one_session_can_be_used_by_several_threads(make: Make) -> None:
    weight = _weight((300, 640), "nf4", 64)
    node = make(weight)
    inputs = [np.random.default_rng(rows).standard_normal((rows, 640), np.float32) for rows in (1, 2, 40, 70)]
    expected = [run(node, x) for x in inputs]
    failures: list[int] = []

    def work(index: int) -> None:
        if not all(np.array_equal(run(node, inputs[index]), expected[index]) for _ in range(50)):
            failures.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_data_at_odd_addresses_of_a_mapped_file(kernels: str, tmp_path: Path) -> None:
    weight = _weight((70, 192), "nf4", 64)
    constants = {"B": weight.codes.numpy(), "absmax": weight.absmax.numpy()}
    model = one_node("MatMulBnb4", constants, {"K": 192, "N": 70, "block_size": 64, "quant_type": 1})
    data = b""
    for tensor in model.graph.initializer:
        data += b"?"
        for key, value in (("location", "data"), ("offset", len(data)), ("length", len(tensor.raw_data))):
            tensor.external_data.add(key=key, value=str(value))
        data += tensor.raw_data
        tensor.data_location = TensorProto.EXTERNAL
        tensor.ClearField("raw_data")
    (tmp_path / "data").write_bytes(data)
    onnx.save(model, tmp_path / "model.onnx")
    mapped = session(tmp_path / "model.onnx", kernels)
    for rows in (1, 40):
        x = np.random.default_rng(rows).standard_normal((rows, 192), np.float32)
        _close(run(mapped, x), x, weight)


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"block_size": 8}, "block_size is 8, not 16 to 4096"),
        ({"block_size": 8192}, "block_size is 8192, not 16 to 4096"),
        ({"quant_type": 2}, "quant_type is 2, not 0"),
        ({"K": 0}, "K and N must be positive"),
        ({"N": -1}, "K and N must be positive"),
        ({"N": 1 << 62}, "fit in memory"),
        ({"path": 9}, "path 9 does not exist"),
    ],
    ids=str,
)
def test_attributes_that_make_no_sense_are_refused_at_load(
    kernels: str, attributes: dict[str, int], message: str
) -> None:
    with pytest.raises(RefusedAtLoad, match=message):
        _session(_weight((4, 64), "nf4", 64), kernels, **attributes)


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"N": 5}, "B has 128 bytes, not 160"),
        ({"N": 3}, "B has 128 bytes"),
        ({"block_size": 32}, "absmax has 4 values, not 8"),
        ({"block_size": 128}, "absmax has 4 values"),
        ({"K": 128, "N": 2}, "the last dimension of A is 64, not K = 128"),
    ],
    ids=str,
)
@pytest.mark.parametrize("rows", [0, 1, 40])
def test_sizes_that_do_not_fit_are_an_error_and_no_crash(
    kernels: str, attributes: dict[str, int], message: str, rows: int
) -> None:
    node = _session(_weight((4, 64), "nf4", 64), kernels, **attributes)
    with pytest.raises(InvalidArgument, match=message):
        run(node, np.ones((rows, 64), np.float32))


def test_a_scalar_is_no_input(kernels: str) -> None:
    node = _session(_weight((4, 64), "nf4", 64), kernels, rank=0)
    with pytest.raises(InvalidArgument, match="the last dimension of A"):
        node.run(None, {"A": np.ones((), np.float32)})
