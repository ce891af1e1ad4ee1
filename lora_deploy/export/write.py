"""The files of an export, written one after the other into a directory where they are staged; the graph last."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass

from lora_deploy.adapter.packing import deployed_adapter
from lora_deploy.entries import FILES_ENTRY
from lora_deploy.export.base_data import BaseData, base_facts, describe_base, has_own_file, keep_base
from lora_deploy.export.branch import add_slot_inputs, stream_branches
from lora_deploy.export.coded import stream_codes
from lora_deploy.export.merge import MergedParameters, merged_adapter
from lora_deploy.export.onnx_adapter import write_onnx_adapter
from lora_deploy.export.outputs import stream_output_changes
from lora_deploy.export.plan import ExportPlan
from lora_deploy.export.provenance import describe_rounding, describe_sources, make_manifest
from lora_deploy.export.rounded import RoundedWeights, stream_rounded
from lora_deploy.export.seq2seq import write_parts
from lora_deploy.export.side_files import write_side_files
from lora_deploy.export.weights import largest_first, stream_constants, stream_weights
from lora_deploy.export.writer import data_name, write_data, write_model
from lora_deploy.integrity import hash_file
from lora_deploy.places import remember_place
from lora_deploy.quantization.hashes import combine_hashes
from lora_deploy.requantize.text import Text, pick_text, rows_taken

__all__ = ["OnProgress", "Written", "calibration_texts", "write_export"]

# Told during the work: what is being done, how much of it is done, and of how much.
OnProgress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Written:
    """What was written.

    Attributes:
        codes_sha256: Hash of all quantized weights (`TrainingRecord.codes_sha256`); None where there are none.
        kept_base: Whether the base's weights are the file of the export that is replaced.
    """

    codes_sha256: str | None
    kept_base: bool


def write_export(plan: ExportPlan, staging: Path, on_progress: OnProgress) -> Written:
    """Write the whole export, the graph last.

    Args:
        plan: What is exported; its graph gets its weights.
        staging: An empty directory.
        on_progress: Is told the task, how much is done and of how much.

    Raises:
        InputError: A weight or an update cannot be deployed.
        OutputError: It could not be written.
    """
    written = 0

    def on_bytes(count: int) -> None:
        nonlocal written
        written += count
        on_progress("writing weights", written, plan.expected_bytes)

    graph = plan.lowered.graph.model
    facts = base_facts(plan)
    kept, rounded = keep_base(plan, facts, staging), None
    if kept is None:
        base, rounded = _write_base(plan, staging, on_progress, on_bytes)
    else:
        base = kept
        on_bytes((staging / data_name(str(kept.sha256))).stat().st_size)
    files = [base.sha256]
    if has_own_file(plan):
        files.append(write_data(graph, _stream_adapters(plan), staging, on_bytes))
    ClearMetadataAndDocStringPass()(graph)
    if plan.branch == "hot-swap":
        add_slot_inputs(graph, plan.lowered.slots)
    manifest = make_manifest(plan, base.codes)
    graph.producer_name, graph.producer_version = "lora-deploy", version("lora-deploy")
    entries = describe_sources(plan) | describe_base(base, facts, plan.base_sha256)
    if plan.lowered.parts:
        entries["lora_deploy.version"] = graph.producer_version
        write_parts(plan.lowered, manifest, entries, staging)
    if plan.branch == "hot-swap":
        for name, lora in plan.adapters.items():
            write_onnx_adapter(lora, manifest, staging, name)
    write_side_files(plan, staging)
    graph.metadata_props.update({**entries, **manifest.entries(), FILES_ENTRY: _hash_files(staging, files)})
    if rounded is not None:
        graph.metadata_props.update(describe_rounding(plan, rounded))
    write_model(graph, staging)
    return Written(base.codes_sha256, kept is not None)


def _write_base(
    plan: ExportPlan, staging: Path, on_progress: OnProgress, on_bytes: Callable[[int], None]
) -> tuple[BaseData, RoundedWeights | None]:
    parameters = MergedParameters(plan.base, merged_adapter(plan.branch, plan.adapters))
    rounded = _round(plan, parameters, staging, on_progress) if plan.requantization is not None else None
    sha256 = write_data(plan.lowered.graph.model, _stream_base(plan, parameters, rounded), staging, on_bytes)
    if rounded is not None:
        rounded.remove()
    codes = {**parameters.code_hashes, **(rounded.hashes if rounded is not None else {})}
    return BaseData(sha256, codes, combine_hashes(parameters.code_hashes)), rounded


def _hash_files(staging: Path, data: Iterable[str | None]) -> str:
    """What the graph records of all other files."""
    files = {path.relative_to(staging).as_posix(): path for path in staging.rglob("*") if path.is_file()}
    known = {data_name(sha256): sha256 for sha256 in data if sha256 is not None}
    return json.dumps({name: known.get(name) or hash_file(file) for name, file in sorted(files.items())})


def calibration_texts(plan: ExportPlan) -> list[Text]:
    """What merged weights are rounded for."""
    asked = plan.requantization
    if asked is None or not asked.rows:
        return []
    return pick_text(plan.base, asked.data, [record.data for record in plan.records.values()], asked.rows)


def _round(plan: ExportPlan, parameters: MergedParameters, staging: Path, on_progress: OnProgress) -> RoundedWeights:
    """The merged weights as codes."""
    asked = plan.requantization
    assert asked is not None
    scale_dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[plan.compute_dtype]
    rounded, texts = RoundedWeights(staging / ".rounded", parameters, plan.grids, scale_dtype), calibration_texts(plan)
    rounded.taken = rows_taken(texts)
    for text in texts:
        if text.name == "task" and text.source:
            remember_place(hash_file(Path(text.source)), text.source)

    def on_layer(done: int, total: int) -> None:
        on_progress("rounding weights", done, total)

    rounded.calibrate(texts, asked.correction, on_layer)
    return rounded


def _stream_base(
    plan: ExportPlan, parameters: MergedParameters, rounded: RoundedWeights | None
) -> Iterator[tuple[str, torch.Tensor]]:
    """The base's weights, merged or its own, one tensor at a time, and all that shares their file."""
    lowered, graph = plan.lowered, plan.lowered.graph.model
    yield from stream_weights(graph, largest_first(lowered.graph.sources, plan.base.shapes), parameters)
    yield from stream_codes(graph, lowered.coded, plan.base, parameters.code_hashes)
    if rounded is not None:
        yield from stream_rounded(graph, lowered.coded, rounded)
        if rounded.updates:
            yield from stream_branches(lowered.slots, [rounded.correction()], plan.compute_dtype)
    if not has_own_file(plan):
        yield from _stream_adapters(plan)


def _stream_adapters(plan: ExportPlan) -> Iterator[tuple[str, torch.Tensor]]:
    """What adapters bring into the graph, and the graph's own constants."""
    lowered, graph = plan.lowered, plan.lowered.graph.model
    if lowered.changes:
        built_in = deployed_adapter(next(iter(plan.adapters.values())), lowered.slots if plan.branch else ())
        yield from stream_output_changes(graph, lowered.changes, built_in, MergedParameters(plan.base, None))
    if plan.branch in ("fixed", "pooled"):
        yield from stream_branches(lowered.slots, list(plan.adapters.values()), plan.compute_dtype)
    yield from stream_constants(graph)
