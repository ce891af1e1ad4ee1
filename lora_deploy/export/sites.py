"""The linear layers of a graph, those that read the same input taken together, and how a site is replaced."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir
import torch

from lora_deploy.export.graph import Segment, WeightSource

__all__ = [
    "Linear",
    "LinearSite",
    "Product",
    "constant",
    "find_sites",
    "matmul_transposed",
    "replace_site",
    "share_initializers",
]


@dataclass(frozen=True)
class Linear:
    """`Transpose(W) -> MatMul(x, Wt)`: one linear layer of the graph.

    Attributes:
        matmul: The MatMul node.
        transpose: The node that transposes the weight.
        weight: The initializer, (out, in).
    """

    matmul: ir.Node
    transpose: ir.Node
    weight: ir.Value

    @property
    def output(self) -> ir.Value:
        """What the layer gives."""
        return self.matmul.outputs[0]


@dataclass(frozen=True)
class LinearSite:
    """Linear layers of the graph that read the same input (q, k and v; gate and up): one product serves them all.

    Attributes:
        name: Made of the layers' names in the transformers model, "model.layers.0.mlp.gate_proj+up_proj".
        linears: The layers, in the graph's order.
        source: Where the rows of all their weights come from, in order.
    """

    name: str
    linears: tuple[Linear, ...]
    source: WeightSource

    @property
    def input(self) -> ir.Value:
        """What the layers read."""
        value = self.linears[0].matmul.inputs[0]
        assert value is not None
        return value

    @property
    def widths(self) -> list[int]:
        """Outputs of each layer."""
        return [_shape(linear.weight)[0] for linear in self.linears]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of all layers together."""
        return sum(self.widths), _shape(self.linears[0].weight)[1]


def _shape(weight: ir.Value) -> tuple[int, int]:
    assert weight.shape is not None
    rows, columns = weight.shape.numpy()
    return rows, columns


@dataclass(frozen=True)
class Product:
    """New nodes that compute something of a site's input.

    Attributes:
        nodes: In order.
        output: What they give, (..., out).
    """

    nodes: tuple[ir.Node, ...]
    output: ir.Value


def find_sites(model: ir.Model, sources: dict[str, WeightSource]) -> list[LinearSite]:
    """All linear layers of a graph, in its order, grouped by the input that they read.

    A layer whose weight something else reads too (a tied output head) is a site of its own.

    Args:
        model: The graph.
        sources: Where each initializer gets its values.
    """
    groups: dict[tuple[int, bool], list[Linear]] = {}
    for linear in _find_linears(model):
        shared = len(list(linear.weight.uses())) + len(list(linear.transpose.outputs[0].uses())) > 2
        transposed = sources[str(linear.weight.name)].transposed
        key = id(linear.matmul) if shared else id(linear.matmul.inputs[0])
        groups.setdefault((key, transposed), []).append(linear)
    sites: dict[str, LinearSite] = {}
    for (_, transposed), linears in groups.items():
        segments = _join([segment for linear in linears for segment in sources[str(linear.weight.name)].segments])
        name = _site_name(segments)
        while name in sites:  # a layer that the graph runs twice, or in parts
            name += "'"
        sites[name] = LinearSite(name, tuple(linears), WeightSource(segments, transposed))
    return list(sites.values())


def _find_linears(model: ir.Model) -> list[Linear]:
    found = []
    for node in model.graph:
        if node.op_type != "MatMul" or node.domain != "":
            continue
        right = node.inputs[1]
        transpose = right.producer() if right is not None else None
        if transpose is None or transpose.op_type != "Transpose":
            continue
        weight = transpose.inputs[0]
        if weight is not None and weight.is_initializer() and weight.const_value is None:
            found.append(Linear(node, transpose, weight))
    return found


def _join(segments: Sequence[Segment]) -> tuple[Segment, ...]:
    """Neighbours that are consecutive rows of one parameter become one: a split parameter is whole again."""
    joined: list[Segment] = []
    for segment in segments:
        last = joined[-1] if joined else None
        if (
            last is not None
            and last.parameter == segment.parameter
            and isinstance(last.rows, range)
            and isinstance(segment.rows, range)
            and last.rows.stop == segment.rows.start
        ):
            joined[-1] = Segment(last.parameter, range(last.rows.start, segment.rows.stop))
        else:
            joined.append(segment)
    return tuple(joined)


def _site_name(segments: Sequence[Segment]) -> str:
    modules = list(dict.fromkeys(segment.parameter.removesuffix(".weight") for segment in segments))
    parent, _, _ = modules[0].rpartition(".")
    if len(modules) == 1 or any(module.rpartition(".")[0] != parent for module in modules):
        return "+".join(modules)
    return f"{parent}.{'+'.join(module.rpartition('.')[2] for module in modules)}"


def matmul_transposed(x: ir.Value, weight: ir.Value, name: str) -> Product:
    """`FusedMatMul(x, W, transB=1)`, with the weight (out, in), as the checkpoint has it.

    Nothing is transposed at export, onnxruntime transposes and copies nothing when it opens the model, and a tied
    embedding serves the output head as it is. Measured on SmolLM2-135M, two cores, against Transpose + MatMul: the
    same logits bit for bit, opened in 0.5 s instead of 0.8 s.
    """
    node = ir.node("FusedMatMul", [x, weight], attributes={"transB": 1}, domain="com.microsoft", name=name)
    return Product((node,), node.outputs[0])


def constant(model: ir.Model, name: str, values: Sequence[int] | torch.Tensor) -> ir.Value:
    """A small constant of the graph, shared by name; int64 where it is given as plain numbers."""
    if name not in model.graph.initializers:
        tensor = values if isinstance(values, torch.Tensor) else torch.tensor(values, dtype=torch.int64)
        value = ir.val(name, const_value=ir.tensor_adapters.TorchTensor(tensor, name=name))
        model.graph.register_initializer(value)
    return model.graph.initializers[name]


def replace_site(model: ir.Model, site: LinearSite, product: Product) -> None:
    """Let a product take the place of a site's layers, in place; it is split where there are several.

    Args:
        model: The graph.
        site: What is replaced.
        product: Gives the outputs of all the site's layers, side by side.
    """
    graph, nodes, outputs = model.graph, list(product.nodes), [product.output]
    if len(site.linears) > 1:
        sizes = constant(model, f"{site.name}.widths", site.widths)
        split = ir.node("Split", [product.output, sizes], attributes={"axis": -1}, num_outputs=len(site.linears))
        split.name = f"{site.name}.split"
        nodes.append(split)
        outputs = list(split.outputs)
    matmuls = [linear.matmul for linear in site.linears]
    old = [linear.output for linear in site.linears]
    ir.convenience.replace_nodes_and_values(graph, matmuls[0], matmuls, nodes, old, outputs)
    for linear in site.linears:
        if linear.transpose.graph is not None and not linear.transpose.outputs[0].uses():
            graph.remove(linear.transpose, safe=True)
        weight = linear.weight
        if not weight.uses() and not weight.is_graph_output():
            graph.initializers.pop(str(weight.name), None)


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
