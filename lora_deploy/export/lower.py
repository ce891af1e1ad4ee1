"""Every linear layer of a graph gets its final form: the base's product, and the adapter's branch beside it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir
from onnxscript.rewriter import RewriteRuleSet
from onnxscript.rewriter.pattern import RewriteRule

from lora_deploy.adapter import LoraAdapter
from lora_deploy.adapter.packing import packed_rank, slot_strips
from lora_deploy.export.branch import AdapterChoice, add_branch, make_slot
from lora_deploy.export.coded import CodedBase
from lora_deploy.export.graph import Graph, WeightSource
from lora_deploy.export.outputs import OutputChange, OutputChanges
from lora_deploy.export.requantized import RequantizedBase, lower_embedding
from lora_deploy.export.sites import (
    LinearSite,
    Product,
    find_sites,
    matmul_transposed,
    replace_site,
    share_initializers,
)
from lora_deploy.manifest import BranchKind, CodedWeight
from lora_deploy.slots import Slot

__all__ = ["Branches", "Lowered", "dense_product", "fuse_silu", "lower_graph"]


@dataclass(frozen=True)
class Branches:
    """Which sites get a branch, and of what kind.

    Attributes:
        kind: How adapters stand in the graph.
        adapters: Those that are known now.
        targets: Layers that can be adapted.
        tied: Layers that share their weight with another, by that other's name.
        int8: Whether A and B are stored as int8 codes.
    """

    kind: BranchKind
    adapters: tuple[LoraAdapter, ...]
    targets: Collection[str]
    tied: Mapping[str, str]
    int8: bool = False


@dataclass(frozen=True)
class Lowered:
    """What came out.

    Attributes:
        graph: The graph, still without weights, and the sources of those that are dense.
        coded: The products whose weight stays as codes.
        slots: The places of adapters.
        changes: What else adapters do to the outputs of layers.
        parts: The graphs by the names of their files, where there are several. `graph` then has no nodes, but all that
            they wait for.
    """

    graph: Graph
    coded: tuple[CodedWeight, ...] = ()
    slots: tuple[Slot, ...] = ()
    changes: tuple[OutputChange, ...] = ()
    parts: Mapping[str, Lowered] = field(default_factory=dict)


def lower_graph(
    graph: Graph, coded_base: CodedBase | None, branches: Branches | None, outputs: OutputChanges | None = None
) -> Lowered:
    """Lower every site of a graph, in place.

    Args:
        graph: From `build_graph`.
        coded_base: How the base's codes get into the graph; None where every weight is dense.
        branches: None where adapters are merged, or there is none.
        outputs: What an adapter that is merged or built in does to outputs; None where there is none.
    """
    model = graph.model
    if _dtype_of(model) != ir.DataType.BFLOAT16:
        fuse_silu(model)
    sources = share_initializers(model, graph.sources)
    sites = find_sites(model, sources)
    coded: list[CodedWeight] = []
    slots: list[Slot] = []
    choice = None
    if branches is not None and branches.kind == "pooled":
        choice = AdapterChoice(model, len(branches.adapters), _dtype_of(model))
    for site in sites:
        modules = {segment.parameter.removesuffix(".weight") for segment in site.source.segments}
        if coded_base is not None and any(coded_base.scheme_of(module) != "none" for module in modules):
            product, weights = coded_base.product(model, site, sources)
            coded += weights
        else:
            product = dense_product(model, site, sources)
        if branches is not None:
            slot = make_slot(site, branches.tied, int8=branches.int8)
            if any(module in branches.targets for module in slot.modules):
                slots.append(slot)
                rank, strips = None, []
                if branches.kind != "hot-swap":
                    rank = max(packed_rank(slot, adapter) for adapter in branches.adapters)
                    strips = slot_strips(slot, branches.adapters[0]) if branches.int8 else []
                product = add_branch(model, site, slot, product, rank, choice=choice, strips=strips)
        if outputs is not None:
            product = outputs.add(model, site, product)
        replace_site(model, site, product)
    if isinstance(coded_base, RequantizedBase):
        coded += lower_embedding(model, coded_base, sources, coded)
    if choice is not None:
        choice.place()
    model.graph.opset_imports.setdefault("com.microsoft", 1)
    left = {name: source for name, source in sources.items() if name in model.graph.initializers}
    return Lowered(
        Graph(model, left, graph.genai_config),
        tuple(_name_output(model, one) for one in coded),
        tuple(slots),
        tuple(outputs.made) if outputs is not None else (),
    )


def _name_output(model: ir.Model, weight: CodedWeight) -> CodedWeight:
    """With the name that its product's output has now: where nothing was added to it, that of the layer it replaces."""
    for use in model.graph.initializers[weight.codes].uses():
        if use.node.op_type == weight.operator:
            return weight.model_copy(update={"output": use.node.outputs[0].name})
    return weight


def _dtype_of(model: ir.Model) -> ir.DataType:
    """Of the computation: the logits are of it."""
    dtype = model.graph.outputs[0].dtype
    assert dtype is not None
    return dtype


def fuse_silu(model: ir.Model) -> None:
    """x * sigmoid(x) as one node, `QuickGelu` of alpha 1, in place.

    onnxruntime does the same when it opens a model on a CPU. bfloat16 graphs are left as they are: whether onnxruntime
    has the kernel there has not been tried.
    """

    def silu(op: Any, x: ir.Value) -> ir.Value:
        return op.Mul(x, op.Sigmoid(x))  # type: ignore[no-any-return]

    def quick_gelu(op: Any, x: ir.Value) -> ir.Value:
        return op.QuickGelu(x, alpha=1.0, _domain="com.microsoft", _version=1)  # type: ignore[no-any-return]

    RewriteRuleSet([RewriteRule(silu, quick_gelu)], commute=True).apply_to_model(model)


def dense_product(model: ir.Model, site: LinearSite, sources: dict[str, WeightSource]) -> Product:
    """x @ W.T with the weights of all the site's layers below each other.

    Args:
        model: The graph; gets the joined weight.
        site: The linear layers.
        sources: Gets the joined weight's source.
    """
    weight = site.linears[0].weight
    if len(site.linears) > 1:
        weight = ir.val(f"{site.name}.weight", dtype=weight.dtype, shape=site.shape)
        model.graph.initializers[str(weight.name)] = weight
        sources[str(weight.name)] = site.source
    return matmul_transposed(site.input, weight, f"{site.name}.product")
