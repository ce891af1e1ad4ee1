"""The linear layers of a graph: where they are, and how a dense weight is put there."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from lora_deploy.export.graph import WeightSource

__all__ = ["LinearSite", "find_sites", "lower_dense", "share_initializers"]


@dataclass(frozen=True)
class LinearSite:
    """`Transpose(W) -> MatMul(x, Wt)`: one linear layer of the graph.

    Attributes:
        matmul: The MatMul node.
        transpose: The node that transposes the weight.
        weight: The initializer, (out, in).
    """

    matmul: ir.Node
    transpose: ir.Node
    weight: ir.Value


def find_sites(model: ir.Model) -> list[LinearSite]:
    """All linear layers of a graph, in its order."""
    sites = []
    for node in model.graph:
        if node.op_type != "MatMul" or node.domain != "":
            continue
        right = node.inputs[1]
        transpose = right.producer() if right is not None else None
        if transpose is None or transpose.op_type != "Transpose":
            continue
        weight = transpose.inputs[0]
        if weight is not None and weight.is_initializer() and weight.const_value is None:
            sites.append(LinearSite(node, transpose, weight))
    return sites


def lower_dense(model: ir.Model, sites: list[LinearSite]) -> None:
    """Turn each site into `FusedMatMul(x, W, transB=1)`, in place.

    The weight then stays as the checkpoint has it, (out, in): nothing is transposed at export, onnxruntime transposes
    and copies nothing when it opens the model, and a tied embedding serves the output head as it is. Measured on
    SmolLM2-135M, two cores, against Transpose + MatMul: the same logits bit for bit, opened in 0.5 s instead of 0.8 s.
    """
    for site in sites:
        old = site.matmul
        new = ir.node(
            "FusedMatMul",
            [old.inputs[0], site.weight],
            attributes={"transB": 1},
            domain="com.microsoft",
            name=old.name,
        )
        output = new.outputs[0]
        output.name, output.type, output.shape = old.outputs[0].name, old.outputs[0].type, old.outputs[0].shape
        ir.convenience.replace_nodes_and_values(model.graph, old, [old], [new], [old.outputs[0]], [output])
        if not site.transpose.outputs[0].uses():
            model.graph.remove(site.transpose, safe=True)
    model.graph.opset_imports.setdefault("com.microsoft", 1)


def share_initializers(model: ir.Model, sources: dict[str, WeightSource]) -> dict[str, WeightSource]:
    """Let initializers that would hold the same values be one, in place: tied embeddings stay tied.

    Args:
        model: The graph.
        sources: Where each initializer gets its values.

    Returns:
        The sources of the initializers that are left.
    """
    first: dict[tuple[WeightSource, ir.DataType | None], ir.Value] = {}
    left = {}
    for name, source in sources.items():
        value = model.graph.initializers[name]
        shared = first.setdefault((source, value.dtype), value)
        if shared is value:
            left[name] = source
            continue
        ir.convenience.replace_all_uses_with(value, shared)
        del model.graph.initializers[name]
    return left
