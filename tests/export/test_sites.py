"""Linear layers of a graph: all are found, none is transposed any more, and equal weights are stored once."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from lora_deploy.export.graph import Segment, WeightSource, build_graph
from lora_deploy.export.lower import dense_product, lower_graph
from lora_deploy.export.sites import LinearSite, find_sites, replace_site, share_initializers
from lora_deploy.quantization.base import TrainingBase
from tests.conftest import TINY_FAMILIES, CheckpointFactory
from tests.export.conftest import ExportFactory

FLOAT = ir.DataType.FLOAT


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_every_linear_layer_is_found_and_none_is_transposed_after_lowering(
    family: str, checkpoint_dir: CheckpointFactory
) -> None:
    base = TrainingBase(checkpoint_dir(family))
    shapes = {name: shape for name, shape in base.shapes.items() if name not in base.aliases}
    graph = build_graph(base.config, shapes, precision="fp32", provider="cpu", file="config.json")
    sites = find_sites(graph.model, graph.sources)
    # GPT-2's c_attn is three layers in the graph; the output head is one everywhere.
    linears = [linear for site in sites for linear in site.linears]
    assert len(linears) == len(base.linears) + 1 + (2 * 2 if family == "gpt2" else 0)
    packed = ["attn.c_attn"] if family == "gpt2" else ["self_attn.q_proj+k_proj+v_proj", "mlp.gate_proj+up_proj"]
    for name in packed:
        assert len([site for site in sites if site.name.endswith(name)]) == 2
    assert len(sites) == 2 * 4 + 1
    model = lower_graph(graph, None, None).graph.model
    counts = Counter(node.op_type for node in model.graph)
    assert counts["FusedMatMul"] == len(sites)
    assert counts["MatMul"] == counts["Transpose"] == 0
    assert find_sites(model, graph.sources) == []
    assert model.graph.opset_imports["com.microsoft"] == 1


def test_an_export_has_no_transposed_weight(tiny_export: ExportFactory) -> None:
    _, _, result = tiny_export("gpt2")
    graph = ir.load(result.output / "model.onnx").graph
    assert not [node for node in graph if node.op_type in ("Transpose", "MatMul")]


def _model(nodes: list[ir.Node], weights: list[ir.Value], inputs: list[ir.Value], outputs: list[ir.Value]) -> ir.Model:
    graph = ir.Graph(inputs, outputs, nodes=nodes, initializers=weights, name="g", opset_imports={"": 21})
    return ir.Model(graph, ir_version=10)


def _linear(x: ir.Value, weight: ir.Value, name: str) -> tuple[list[ir.Node], ir.Value]:
    transpose = ir.node("Transpose", [weight], attributes={"perm": [1, 0]})
    matmul = ir.node("MatMul", [x, transpose.outputs[0]], name=name)
    matmul.outputs[0].name, matmul.outputs[0].type = f"{name}_out", ir.TensorType(FLOAT)
    return [transpose, matmul], matmul.outputs[0]


def _sources(*names: str) -> dict[str, WeightSource]:
    return {name: WeightSource((Segment(f"{name}.weight", range(4)),)) for name in names}


def _lower_dense(model: ir.Model, sites: list[LinearSite], sources: dict[str, WeightSource]) -> None:
    for site in sites:
        replace_site(model, site, dense_product(model, site, sources))
    model.graph.opset_imports["com.microsoft"] = 1


def test_lowering_computes_the_same_also_where_two_layers_share_a_transposed_weight(tmp_path: Path) -> None:
    x = ir.val("x", dtype=FLOAT, shape=["batch", 4])
    weight, other = (ir.val(name, dtype=FLOAT, shape=(4, 4)) for name in ("w", "v"))
    nodes, hidden = _linear(x, weight, "first")
    transposed = nodes[0].outputs[0]
    second = ir.node("MatMul", [hidden, transposed], name="second")
    third, y = _linear(second.outputs[0], other, "third")
    y.name = "y"
    model = _model([*nodes, second, *third], [weight, other], [x], [y])
    sources = _sources("w", "v")
    sites = find_sites(model, sources)
    assert [site.linears[0].weight.name for site in sites] == ["w", "w", "v"]
    assert len({site.name for site in sites}) == 3
    _lower_dense(model, sites, sources)
    assert [node.op_type for node in model.graph] == ["FusedMatMul"] * 3
    random = np.random.default_rng(0)
    arrays = {name: random.standard_normal((4, 4), np.float32) for name in ("w", "v")}
    for name, array in arrays.items():
        model.graph.initializers[name].const_value = ir.Tensor(array, name=name)
    ir.save(model, tmp_path / "m.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
    rows = random.standard_normal((3, 4), np.float32)
    (found,) = session.run(["y"], {"x": rows})
    assert np.allclose(found, rows @ arrays["w"].T @ arrays["w"].T @ arrays["v"].T, atol=1e-5)


def test_a_product_that_is_no_linear_layer_is_left_alone() -> None:
    x = ir.val("x", dtype=FLOAT, shape=[4, 4])
    constant = ir.val("c", dtype=FLOAT, shape=(4, 4), const_value=ir.Tensor(np.eye(4, dtype=np.float32), name="c"))
    weight = ir.val("w", dtype=FLOAT, shape=(4, 4))
    of_inputs = ir.node("MatMul", [x, x])
    turned = ir.node("Transpose", [x])
    of_turned_inputs = ir.node("MatMul", [of_inputs.outputs[0], turned.outputs[0]])
    plain = ir.node("MatMul", [of_turned_inputs.outputs[0], weight])
    known, y = _linear(plain.outputs[0], constant, "known")
    nodes = [of_inputs, turned, of_turned_inputs, plain, *known]
    model = _model(nodes, [weight, constant], [x], [y])
    assert find_sites(model, _sources("w", "c")) == []


def test_initializers_of_the_same_source_become_one_and_others_stay() -> None:
    tied = WeightSource((Segment("embed", range(4)),))
    sources = {
        "embed": tied,
        "head": WeightSource((Segment("embed", range(4)),)),
        "half": tied,
        "turned": WeightSource((Segment("embed", range(4)),), transposed=True),
        "rows": WeightSource((Segment("embed", (3, 2, 1, 0)),)),
        "other": WeightSource((Segment("other", range(4)),)),
    }
    values = [ir.val(name, dtype=FLOAT, shape=(4, 4)) for name in sources]
    values[2].type = ir.TensorType(ir.DataType.FLOAT16)  # of another type: cannot be the same tensor
    nodes = [ir.node("Identity", [value]) for value in values]
    model = _model(nodes, values, [], [node.outputs[0] for node in nodes])
    left = share_initializers(model, sources)
    assert list(left) == ["embed", "half", "turned", "rows", "other"]
    assert list(model.graph.initializers) == list(left)
    read = [node.inputs[0].name for node in model.graph if node.inputs[0] is not None]
    assert read == ["embed", "embed", "half", "turned", "rows", "other"]
