"""The graph of a base, lowered for its adapters: built or traced, ties broken, every linear layer in its final form."""

from __future__ import annotations

import copy
from collections.abc import Mapping

from transformers import PreTrainedConfig

from lora_deploy.adapter import LoraAdapter
from lora_deploy.export.coded import CodedBase
from lora_deploy.export.graph import Graph, build_graph
from lora_deploy.export.lower import Branches, Lowered, lower_graph
from lora_deploy.export.options import ComputeDtype, Provider
from lora_deploy.export.outputs import OutputChanges
from lora_deploy.export.requantized import RequantizedBase, correction_shapes
from lora_deploy.export.seq2seq import join_parts, trace_parts
from lora_deploy.export.source import SourceChoice
from lora_deploy.export.ties import broken_ties
from lora_deploy.export.traced import trace_graph
from lora_deploy.export.traced_decoder import trace_decoder
from lora_deploy.manifest import BranchKind
from lora_deploy.quantization.base import TrainingBase
from lora_deploy.task import is_classification

__all__ = ["prepare_graph"]


def prepare_graph(
    base: TrainingBase,
    adapters: Mapping[str, LoraAdapter],
    branch: BranchKind | None,
    int8: bool,
    coded_base: CodedBase | None,
    compute_dtype: ComputeDtype,
    provider: Provider,
    correction: int,
    graph_source: SourceChoice,
) -> Lowered:
    """Build the graph and lower its linear layers. A tie that a merged or trained weight breaks is broken here too."""
    updated = {name for lora in adapters.values() for name in lora.updates}
    broken = broken_ties(base, adapters, branch)
    shapes = {name: shape for name, shape in base.shapes.items() if name not in base.aliases or name in broken}
    config = base.config
    if broken:
        if base.task == "seq2seq-lm":  # made anew, a T5 configuration would forget that what the head reads is scaled
            config = copy.deepcopy(config)
            config.tie_word_embeddings = False
        else:
            config = type(config).from_dict({**config.to_dict(), "tie_word_embeddings": False})
    tied = {
        name.removesuffix(".weight"): alias.removesuffix(".weight")
        for alias, name in base.aliases.items()
        if alias not in broken
    }
    branches = None
    if branch is not None:
        targets = updated | set(base.linears) if branch == "hot-swap" else updated
        branches = Branches(branch, tuple(adapters.values()), targets, tied, int8)
    elif correction and isinstance(coded_base, RequantizedBase):
        shape = correction_shapes(base, coded_base.grids, correction)
        branches = Branches("fixed", (shape,), shape.updates.keys(), {}, int8=True)

    def outputs() -> OutputChanges | None:
        if branch not in (None, "fixed") or not adapters:
            return None
        return OutputChanges(next(iter(adapters.values())), tied if branch else {}, beside=branch is not None)

    if base.task == "seq2seq-lm":
        aliases = {alias: name for alias, name in base.aliases.items() if alias not in broken}
        parts = trace_parts(config, aliases, precision=compute_dtype, file=base.directory / "config.json")
        lowered = {name: lower_graph(part, coded_base, branches, outputs()) for name, part in parts.items()}
        return join_parts(lowered, config.model_type)
    graph = _build_graph(base, config, shapes, compute_dtype, provider, graph_source)
    return lower_graph(graph, coded_base, branches, outputs())


def _build_graph(
    base: TrainingBase,
    config: PreTrainedConfig,
    shapes: dict[str, tuple[int, ...]],
    compute_dtype: ComputeDtype,
    provider: Provider,
    graph_source: SourceChoice,
) -> Graph:
    """The graph from the source that was chosen."""
    file = base.directory / "config.json"
    if is_classification(base.task):
        return trace_graph(config, precision=compute_dtype, file=file)
    if graph_source.source == "traced":
        return trace_decoder(config, shapes, precision=compute_dtype, file=file)
    return build_graph(config, shapes, precision=compute_dtype, provider=provider, file=file)
