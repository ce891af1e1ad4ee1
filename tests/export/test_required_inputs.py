"""Optional inputs made required: the same function, for clients that feed only what a graph asks for."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnx.external_data_helper import set_external_data

from lora_deploy.export.required_inputs import require_inputs
from lora_deploy.manifest import Manifest
from lora_deploy.run import OnnxSession
from lora_deploy.run.adapters import Adapters
from lora_deploy.run.session import numpy_of
from tests.conftest import token_ids
from tests.export.conftest import BranchExport, BranchFactory

TWO = {"a": {"seed": 1, "r": 3}, "b": {"seed": 2, "r": 5}}


def required(export: BranchExport, directory: Path) -> tuple[Path, list[str]]:
    """The export's graph with required inputs, beside the same weights, which nothing reads on the way."""
    model = onnx.load(export.output / "model.onnx", load_external_data=False)
    names = require_inputs(model)
    (directory / "model.onnx").write_bytes(model.SerializeToString())
    for data in export.output.glob("*.data"):
        shutil.copy(data, directory)
    onnx.checker.check_model(str(directory / "model.onnx"))
    return directory / "model.onnx", names


def run_bare(session: Any, ids: NDArray[np.int64], given: dict[str, Any]) -> NDArray[np.float32]:
    """Logits of a prompt, by onnxruntime alone."""
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), **given}
    for node in session.get_inputs():
        if node.name == "position_ids":
            feeds[node.name] = np.arange(ids.shape[1], dtype=np.int64)[None].repeat(len(ids), 0)
        elif node.name.startswith("past_key_values."):
            feeds[node.name] = np.zeros([len(ids), node.shape[1], 0, node.shape[3]], np.float32)
    return np.asarray(session.run(["logits"], feeds)[0])


@pytest.mark.parametrize("precision", [None, "int8"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_hot_swap_graph_asks_for_its_slots(
    family: str, precision: str | None, branch_export: BranchFactory, tmp_path: Path
) -> None:
    options = {"adapter_precision": precision} if precision else {}
    export = branch_export(family, "nf4", "hot-swap", TWO, **options)
    file, names = required(export, tmp_path)
    manifest, ids = Manifest.load(export.output), token_ids(2, 7).numpy()
    assert names == [name for slot in manifest.slots for name in slot.input_names]
    session = onnxruntime.InferenceSession(str(file))
    assert session.get_overridable_initializers() == []
    assert set(names) < {node.name for node in session.get_inputs()}
    with pytest.raises(ValueError, match="Required inputs"):
        run_bare(session, ids, {})

    ours = OnnxSession(export.output)
    adapters = Adapters(ours, export.output)
    types = {name: np.float32 if kind == "tensor(float)" else np.int8 for name, kind in ours.optional_inputs.items()}
    answers = []
    for name in (None, "a", "b"):
        expected, _ = ours.forward(ids, np.ones_like(ids), None, adapters.inputs(name))
        given = {key: numpy_of(value) for key, value in adapters.inputs(name).items()}
        ranks = [0, 1] if name is None else [0]  # either is nothing
        for rank in ranks:
            empty = {
                key: np.zeros(shape, types[key])
                for slot in manifest.slots
                for key, shape in zip(slot.input_names, slot.input_shapes(rank), strict=True)
            }
            assert np.array_equal(run_bare(session, ids, empty | given), expected)
        answers.append(expected)
    bare, one, other = answers
    assert min(np.abs(one - bare).max(), np.abs(other - bare).max(), np.abs(one - other).max()) > 0.1


def test_a_pooled_graph_asks_for_the_ids(branch_export: BranchFactory, tmp_path: Path) -> None:
    export = branch_export("llama", "nf4", "pooled", TWO)
    file, names = required(export, tmp_path)
    assert names == ["adapter_ids"]
    session, ids = onnxruntime.InferenceSession(str(file)), token_ids(1, 7).numpy().repeat(3, 0)
    ours = OnnxSession(export.output)
    rows = Adapters(ours, export.output).row_inputs(["b", None, "a"])
    expected, _ = ours.forward(ids, np.ones_like(ids), None, rows)
    assert np.array_equal(run_bare(session, ids, {"adapter_ids": np.array([1, -1, 0])}), expected)
    assert min(np.abs(expected[row] - expected[row - 1]).max() for row in range(3)) > 0.1


def test_values_beside_the_graph_go_as_well_and_what_is_no_input_stays(tmp_path: Path) -> None:
    """An initializer whose values are in a file of their own, read by nobody: there is no such file yet."""
    values = {name: np.full((2, 2), number, np.float32) for number, name in enumerate(["free", "kept"], start=3)}
    tensors = [numpy_helper.from_array(array, name) for name, array in values.items()]
    for number, tensor in enumerate(tensors):
        set_external_data(tensor, "weights.data", offset=16 * number, length=16)
        tensor.ClearField("raw_data")
    x, free, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 2]) for name in ("x", "free", "y"))
    nodes = [helper.make_node("MatMul", ["x", "free"], ["h"]), helper.make_node("Add", ["h", "kept"], ["y"])]
    graph = helper.make_graph(nodes, "g", [free, x], [y], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    assert require_inputs(model) == ["free"]
    assert [tensor.name for tensor in model.graph.initializer] == ["kept"]
    assert require_inputs(model) == []
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    (tmp_path / "weights.data").write_bytes(b"".join(array.tobytes() for array in values.values()))
    onnx.checker.check_model(str(tmp_path / "model.onnx"))
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))
    given = {"x": np.eye(2, dtype=np.float32), "free": np.array([[1, 2], [3, 4]], np.float32)}
    assert session.run(None, given)[0].tolist() == [[5, 6], [7, 8]]
