"""What an export says of itself in `metadata_props`: what it is, and what it was made of."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lora_deploy.adapter import LoraAdapter
from lora_deploy.export.branch import stream_branches
from lora_deploy.export.merge import hash_adapter
from lora_deploy.export.plan import ExportPlan
from lora_deploy.export.rounded import RoundedWeights
from lora_deploy.manifest import Manifest
from lora_deploy.quantization.hashes import hash_tensors

__all__ = ["describe_rounding", "describe_sources", "make_manifest"]


def make_manifest(plan: ExportPlan, hashes: Mapping[str, str]) -> Manifest:
    """What a graph says of itself, for `run` and `verify`.

    Args:
        plan: What was exported.
        hashes: Of each layer's codes and scales, by name.
    """
    coded = tuple(
        weight.model_copy(
            update={
                "modules": tuple(module.model_copy(update={"sha256": hashes[module.name]}) for module in weight.modules)
            }
        )
        for weight in plan.lowered.coded
    )
    return Manifest(
        branch=plan.branch,
        precision=plan.precision,
        compute_dtype=plan.compute_dtype,
        base_sha256=plan.base_sha256,
        quantization=plan.base.scheme.model_dump_json(),
        coded=coded,
        slots=plan.lowered.slots if plan.branch is not None else (),
        correction=plan.lowered.slots if plan.branch is None else (),
        pool=tuple(plan.adapters) if plan.branch == "pooled" else (),
        task=plan.base.task,
    )


def describe_sources(plan: ExportPlan) -> dict[str, str]:
    """What the model was made of, for `metadata_props`; no times, no paths: the same input gives the same bytes.

    A base from the hub has its name there; where a local one lies, `lora_deploy.places` remembers.
    """
    sources = ("mobius-onnx",) if plan.graph_source.source == "mobius" else ("transformers",)
    entries = {
        "lora_deploy.provider": plan.provider,
        "lora_deploy.graph": plan.graph_source.source,
        "lora_deploy.versions": json.dumps({name: _version(name) for name in (*sources, "onnx-ir", "torch")}),
    }
    if not Path(plan.model).is_dir():
        entries["lora_deploy.base_model"] = plan.model
    if plan.lowered.graph.genai_config.get("search", {}).get("past_present_share_buffer"):
        entries["lora_deploy.cache"] = "in place"
    if plan.adapters:
        described = {
            name: {"sha256": hash_adapter(adapter), "config": _configuration(adapter)}
            for name, adapter in plan.adapters.items()
        }
        entries["lora_deploy.adapters"] = json.dumps(described, sort_keys=True)
    return entries


def _configuration(adapter: LoraAdapter) -> dict[str, Any]:
    """PEFT's, without the base's name: it is a path where the base was a directory."""
    config: dict[str, Any] = json.loads(adapter.config.to_json())
    config.pop("base_model_name_or_path", None)
    return config


def describe_rounding(plan: ExportPlan, rounded: RoundedWeights) -> dict[str, str]:
    """What rounding was calibrated on, and the hash of its correction, for `metadata_props`."""
    entries = {}
    if rounded.taken:
        entries["lora_deploy.calibration"] = json.dumps(rounded.taken, sort_keys=True)
    if rounded.updates:
        named = stream_branches(plan.lowered.slots, [rounded.correction()], plan.compute_dtype)
        sha256 = hash_tensors((name, [values.flatten()]) for name, values in named)
        entries["lora_deploy.correction_sha256"] = sha256
    return entries


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown"
