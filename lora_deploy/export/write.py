"""The files of an export, written one after the other into a directory where they are staged; the graph last."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass

from lora_deploy.adapter import LoraAdapter
from lora_deploy.adapter.packing import deployed_adapter
from lora_deploy.entries import FILES_ENTRY
from lora_deploy.export.branch import add_slot_inputs, stream_branches
from lora_deploy.export.coded import stream_codes
from lora_deploy.export.merge import MergedParameters
from lora_deploy.export.onnx_adapter import write_onnx_adapter
from lora_deploy.export.outputs import stream_output_changes
from lora_deploy.export.plan import ExportPlan
from lora_deploy.export.provenance import describe_rounding, describe_sources, make_manifest
from lora_deploy.export.rounded import RoundedWeights, stream_rounded
from lora_deploy.export.seq2seq import write_parts
from lora_deploy.export.side_files import write_side_files
from lora_deploy.export.weights import largest_first, stream_constants, stream_weights
from lora_deploy.export.writer import write_data, write_model
from lora_deploy.integrity import hash_file
from lora_deploy.places import remember_place
from lora_deploy.requantize.text import Text, pick_text, rows_taken

__all__ = ["OnProgress", "calibration_texts", "merged_adapter", "write_export"]

# Told during the work: what is being done, how much of it is done, and of how much.
OnProgress = Callable[[str, int, int], None]


def write_export(plan: ExportPlan, staging: Path, on_progress: OnProgress) -> dict[str, str]:
    """Write the whole export, the graph last; returns the hash of each quantized weight read."""
    written = 0

    def on_bytes(count: int) -> None:
        nonlocal written
        written += count
        on_progress("writing weights", written, plan.expected_bytes)

    graph = plan.lowered.graph.model
    parameters = MergedParameters(plan.base, merged_adapter(plan))
    rounded = _round(plan, parameters, staging, on_progress) if plan.requantization is not None else None
    sha256 = write_data(graph, _stream(plan, parameters, rounded), staging, on_bytes)
    if rounded is not None:
        rounded.remove()
    ClearMetadataAndDocStringPass()(graph)
    if plan.branch == "hot-swap":
        add_slot_inputs(graph, plan.lowered.slots)
    manifest = make_manifest(plan, {**parameters.code_hashes, **(rounded.hashes if rounded is not None else {})})
    graph.producer_name, graph.producer_version = "lora-deploy", version("lora-deploy")
    entries = describe_sources(plan, sha256)
    if plan.lowered.parts:
        entries["lora_deploy.version"] = graph.producer_version
        write_parts(plan.lowered, manifest, entries, staging)
    if plan.branch == "hot-swap":
        for name, lora in plan.adapters.items():
            write_onnx_adapter(lora, manifest, staging, name)
    write_side_files(plan, staging)
    graph.metadata_props.update({**entries, **manifest.entries(), FILES_ENTRY: _hash_files(staging, sha256)})
    if rounded is not None:
        graph.metadata_props.update(describe_rounding(plan, rounded))
    write_model(graph, staging)
    return parameters.code_hashes


def _hash_files(staging: Path, data_sha256: str) -> str:
    """What the graph records of all other files."""
    files = {path.relative_to(staging).as_posix(): path for path in staging.rglob("*") if path.is_file()}
    known = {f"model-{data_sha256[:12]}.onnx.data": data_sha256}
    return json.dumps({name: known.get(name) or hash_file(file) for name, file in sorted(files.items())})


def merged_adapter(plan: ExportPlan) -> LoraAdapter | None:
    """What of the adapter is merged: beside a branch, only the parameters that were trained whole."""
    adapter = next(iter(plan.adapters.values()), None)
    if plan.branch is None or adapter is None:
        return adapter
    return replace(adapter, updates={}) if plan.branch == "fixed" else None


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


def _stream(
    plan: ExportPlan, parameters: MergedParameters, rounded: RoundedWeights | None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Everything that the graph waits for, one tensor at a time."""
    lowered, graph = plan.lowered, plan.lowered.graph.model
    yield from stream_weights(graph, largest_first(lowered.graph.sources, plan.base.shapes), parameters)
    yield from stream_codes(graph, lowered.coded, plan.base, parameters.code_hashes)
    if rounded is not None:
        yield from stream_rounded(graph, lowered.coded, rounded)
        if rounded.updates:
            yield from stream_branches(lowered.slots, [rounded.correction()], plan.compute_dtype)
    if lowered.changes:
        built_in = deployed_adapter(next(iter(plan.adapters.values())), lowered.slots if plan.branch else ())
        yield from stream_output_changes(graph, lowered.changes, built_in, MergedParameters(plan.base, None))
    if plan.branch in ("fixed", "pooled"):
        yield from stream_branches(lowered.slots, list(plan.adapters.values()), plan.compute_dtype)
    yield from stream_constants(graph)
