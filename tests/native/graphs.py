"""Graphs of one node, and how close its products have to be."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper

Floats = NDArray[np.float32]


def one_node(
    operator: str,
    constants: Mapping[str, NDArray[Any]],
    attributes: Mapping[str, int],
    domain: str = "lora_deploy",
    rank: int = 2,
) -> onnx.ModelProto:
    """Y = operator(A, *constants), A of this rank."""
    lead = [f"d{i}" for i in range(rank - 1)]
    shapes = ([*lead, "K"], [*lead, "N"]) if rank else ([], None)
    graph = helper.make_graph(
        [helper.make_node(operator, ["A", *constants], ["Y"], domain=domain, **attributes)],
        "one",
        [helper.make_tensor_value_info("A", TensorProto.FLOAT, shapes[0])],
        [helper.make_tensor_value_info("Y", TensorProto.FLOAT, shapes[1])],
        [onnx.numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    opsets = [helper.make_opsetid(name, version) for name, version in (("", 21), (domain, 1))]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def session(model: onnx.ModelProto | Path, kernels: str) -> Any:
    """A session on two threads that knows our operators."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    options.log_severity_level = 4
    options.register_custom_ops_library(kernels)
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def run(node: Any, x: Floats) -> Floats:
    """Y for A = x."""
    return node.run(None, {"A": x})[0]  # type: ignore[no-any-return]


def assert_close(actual: Floats, x: Floats, weight: torch.Tensor) -> None:
    """Within what the order of summation can change. A wrong value of a weight is off by some 1/K of the bound's sum, a
    hundred times as much."""
    values = weight.double().numpy().T
    exact = x.astype(np.float64) @ values
    bound = 1e-6 * (np.abs(x.astype(np.float64)) @ np.abs(values)) + 1e-30
    assert actual.dtype == np.float32
    assert actual.shape == exact.shape
    assert (np.abs(actual - exact) <= bound).all()
