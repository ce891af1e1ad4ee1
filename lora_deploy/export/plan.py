"""Every check that can be made before anything is written."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import get_args

import onnx_ir as ir

from lora_deploy.adapter import LoraAdapter, TrainingRecord, read_adapter
from lora_deploy.adapter.packing import check_slots
from lora_deploy.errors import AdapterError, CheckpointError, UsageError
from lora_deploy.export.attention import group_attention
from lora_deploy.export.coded import CodedBase
from lora_deploy.export.lower import Lowered
from lora_deploy.export.merge import drop_copies, open_base
from lora_deploy.export.options import (
    ComputeDtype,
    Precision,
    Provider,
    check_adapter_precision,
    check_branch,
    check_codes_run,
    check_precision,
    check_provider,
    check_requantization,
    choose_accuracy_level,
    choose_cache,
    choose_types,
    training_scheme,
)
from lora_deploy.export.output import check_output
from lora_deploy.export.prepare import prepare_graph
from lora_deploy.export.requantized import RequantizedBase
from lora_deploy.export.seq2seq import check_seq2seq
from lora_deploy.export.source import SourceChoice, check_graph, choose_source
from lora_deploy.export.ties import broken_ties, check_tables
from lora_deploy.manifest import BranchKind
from lora_deploy.quantization.base import TrainingBase
from lora_deploy.requantize.options import Grid, Requantization

__all__ = ["ONNX_DTYPES", "ExportPlan", "Precision", "Provider", "plan_export"]

ONNX_DTYPES = {"fp32": ir.DataType.FLOAT, "fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}


@dataclass(frozen=True)
class ExportPlan:
    """An export that can be carried out: it exists only if all checks passed.

    Attributes:
        model: The training base, as it was named.
        base: The base as it was trained on.
        branch: How adapters stand in the graph; None where they are merged.
        adapters: The adapters, by name.
        records: What training left beside each of them, where it did.
        precision: Of the weights.
        compute_dtype: Of the computation.
        provider: The execution provider it is meant for.
        output: Directory to write.
        lowered: The graph, lowered, without weights.
        expected_bytes: Size of the weights.
        graph_source: Where the graph comes from, and why.
        requantization: How merged weights become codes; None where they do not.
        grids: Bits and block size of each layer that does, by name.
    """

    model: str
    base: TrainingBase
    branch: BranchKind | None
    adapters: Mapping[str, LoraAdapter]
    records: Mapping[str, TrainingRecord]
    precision: Precision
    compute_dtype: ComputeDtype
    provider: Provider
    output: Path
    lowered: Lowered
    expected_bytes: int
    graph_source: SourceChoice
    requantization: Requantization | None = None
    grids: Mapping[str, Grid] = field(default_factory=dict)

    @property
    def base_sha256(self) -> str:
        """Hash of the training base."""
        return next((record.base_sha256 for record in self.records.values()), None) or self.base.sha256()


def plan_export(
    model: str | Path,
    adapters: str | Path | Mapping[str, str | Path] | None,
    output: str | Path,
    *,
    branch: str | None = None,
    precision: str | None = None,
    compute_dtype: str | None = None,
    expand: bool = False,
    accuracy_level: int | None = None,
    cache: str | None = None,
    requantization: Requantization | None = None,
    adapter_precision: str | None = None,
    quantization: str = "auto",
    double_quant: bool = True,
    graph: str = "auto",
    provider: str = "cpu",
    overwrite: bool = False,
) -> ExportPlan:
    """Check that an export can be made and prepare its graph. Nothing is written.

    Args:
        model: The training base: a local directory or a hub id.
        adapters: Directory of the adapter, or of several by name; None to export the base alone.
        output: Directory to write.
        branch: None to merge; "fixed", "hot-swap" or "pooled" for a branch beside the untouched base.
        precision: Of the weights, "fp32", "fp16", "bf16", "int8" or "int4", and beside a branch also the base's own
            scheme, but not "int4"; None for fp32 on cpu and fp16 elsewhere, beside a branch for the base's own scheme.
        compute_dtype: "fp32", "fp16" or "bf16" where the weights are codes; None for fp32 on cpu and fp16 elsewhere.
        expand: Dequantize the codes by standard operators, which onnxruntime folds when it opens the model.
        accuracy_level: Of int8 and int4 products: 0 leaves activations as they are, 4 rounds them to int8. None for 4
            where merged weights become codes for a CPU, else 0.
        cache: "in-place" to let the attention write into the cache instead of copying it at every step, "growing" for
            a graph that takes new tokens in any number and at any position; None for in-place where merged weights
            become codes for a CPU.
        requantization: How merged weights become int8 or int4; None for the defaults.
        adapter_precision: "int8" to store A and B of a fixed or hot-swap branch as int8 codes with a float32 scale for
            each block; None for floats of the type of the computation.
        quantization: What the training base was: "none", "nf4", "fp4", "int8", or "auto" to read it from the
            checkpoint or from what training left beside the adapter.
        double_quant: Whether nf4 and fp4 were double-quantized.
        graph: Where the graph comes from: "mobius", "traced" from transformers' code, or "auto" to decide.
        provider: "cpu", "cuda", "webgpu" or "dml".
        overwrite: Whether an export that is there already may be replaced.

    Raises:
        UsageError: The options contradict each other or do not say what the base was.
        InputError: Model or adapter are missing, damaged or do not fit each other.
        OutputError: The output exists.
    """
    if adapters is None or isinstance(adapters, Mapping):
        named = {name: Path(directory) for name, directory in (adapters or {}).items()}
    else:
        named = {Path(adapters).resolve().name: Path(adapters)}
    provider = check_provider(provider)
    branch = check_branch(branch, named)
    check_adapter_precision(adapter_precision, branch)
    check_precision(precision, branch, provider)
    check_codes_run(precision, branch, provider, expand)
    asked_graph = check_graph(graph)
    output = check_output(output, overwrite, [Path(model), *named.values()])
    loras = {name: read_adapter(directory, lazy=True) for name, directory in named.items()}
    loaded = {name: TrainingRecord.load(directory) for name, directory in named.items()}
    records = {name: record for name, record in loaded.items() if record is not None}
    base = open_base(model, training_scheme(quantization, double_quant, records), loras.values())
    graph_source = choose_source(asked_graph, base.config, base.task, base.directory / "config.json")
    _check_base(base, quantization, named, records)
    linears = {name: layer.shape for name, layer in base.linears.items()}
    for head in base.heads:
        rows, columns = base.shapes[f"{head}.weight"]
        linears[head] = (rows, columns)
    for lora in loras.values():
        lora.check_against(base.shapes, linears)
        check_tables(lora, base)
    loras = {name: drop_copies(lora, base) for name, lora in loras.items()}
    base.hash_ahead()
    weights, compute = choose_types(base, precision, compute_dtype, branch, provider, expand)
    level = choose_accuracy_level(accuracy_level, weights, branch, provider, expand)
    in_place = choose_cache(cache, weights, branch, provider, compute)
    check_seq2seq(
        base.task,
        branch=branch,
        precision=weights,
        compute=compute,
        own=base.scheme.method,
        adapter_precision=adapter_precision,
    )
    requantization = check_requantization(requantization, weights, branch)
    check_codes_run(weights, branch, provider, expand, requantization, base.task)
    dtype = ONNX_DTYPES[compute]
    coded_base: CodedBase | None = None
    grids: dict[str, Grid] = {}
    if requantization is not None:
        grids = _grids(requantization, base, loras)
        coded_base = RequantizedBase(base, weights, False, dtype, level, grids=grids)
    elif branch is not None and weights not in get_args(ComputeDtype):
        whole = frozenset(name.removesuffix(".weight") for lora in loras.values() for name in lora.parameters)
        coded_base = CodedBase(base, weights, expand, dtype, level, whole)
    correction = requantization.correction if requantization is not None else 0
    lowered = prepare_graph(
        base, loras, branch, adapter_precision == "int8", coded_base, compute, provider, correction, graph_source
    )
    for name, record in records.items():
        _check_record(base, record, str(named[name]))
    if in_place:
        lowered = replace(lowered, graph=group_attention(lowered.graph, required=cache is not None))
    if branch in ("hot-swap", "pooled"):
        for lora in loras.values():
            check_slots(lowered.slots, lora)
    waiting = [value for value in lowered.graph.model.graph.initializers.values() if value.const_value is None]
    expected = sum(_bytes(value) for value in waiting)
    return ExportPlan(
        str(model),
        base,
        branch,
        loras,
        records,
        weights,
        compute,
        provider,
        output,
        lowered,
        expected,
        graph_source,
        requantization,
        grids,
    )


def _grids(requantization: Requantization, base: TrainingBase, adapters: Mapping[str, LoraAdapter]) -> dict[str, Grid]:
    """What each layer gets, an output head too whose tie to the embedding the adapter breaks."""
    grids = requantization.grids(base)
    for alias in broken_ties(base, adapters, None):
        shared = base.aliases[alias].removesuffix(".weight")
        if shared in grids:
            grids[alias.removesuffix(".weight")] = grids[shared]
    return grids


def _bytes(value: ir.Value) -> int:
    assert value.dtype is not None
    assert value.shape is not None
    return math.ceil(value.dtype.itemsize * math.prod(value.shape.numpy()))


def _check_base(
    base: TrainingBase, quantization: str, named: Mapping[str, Path], records: Mapping[str, TrainingRecord]
) -> None:
    if base.prequantized and quantization == "none":
        raise CheckpointError(
            "the checkpoint is quantized already, but it is said that the base was not",
            file=base.directory / "config.json",
            tensor="quantization_config",
            found=base.scheme,
            expected="none",
            remedy="leave --quantization out, or give the full-precision checkpoint",
        )
    if not base.prequantized and quantization == "auto" and not records and named:
        raise UsageError(
            "it is not known which base the adapter was trained on: neither the checkpoint nor the adapter says",
            file=next(iter(named.values())),
            expected="the quantization in training",
            remedy="add --quantization nf4 (QLoRA), fp4, int8, or none for a full-precision base",
        )


def _check_record(base: TrainingBase, record: TrainingRecord, adapter: str) -> None:
    found = base.sha256()
    if found != record.base_sha256:
        raise AdapterError(
            "the adapter was trained on another base: the weights of this model are not the recorded ones",
            file=base.directory,
            found=f"sha256 {found[:16]}…",
            expected=f"sha256 {record.base_sha256[:16]}… ({record.base_model}, recorded in {adapter})",
            remedy="give the model that the adapter was trained on",
        )
