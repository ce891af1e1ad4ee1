"""The base's weights of an export that is replaced: where the new one has the same, their file is kept.

Only beside a branch: there the base's file holds nothing of an adapter, so that an export that is made again with
another adapter reads, quantizes and writes no weight of the base.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
from onnx_ir.serde import deserialize_tensor

from lora_deploy.entries import recorded_files, recorded_text
from lora_deploy.errors import InputError
from lora_deploy.export.commit import link_or_copy, write_failure
from lora_deploy.export.merge import hash_adapter, merged_adapter
from lora_deploy.export.plan import ExportPlan
from lora_deploy.export.weights import large_constants
from lora_deploy.export.writer import data_name
from lora_deploy.graph_check import metadata_of, read_graph
from lora_deploy.integrity import MODEL_NAME, hash_file, seal_of
from lora_deploy.manifest import Manifest
from lora_deploy.versions import installed_versions

__all__ = ["BaseData", "base_facts", "describe_base", "has_own_file", "keep_base"]


@dataclass(frozen=True)
class BaseData:
    """The file that holds the base's weights.

    Attributes:
        sha256: Of the file; None where there is none.
        codes: Hash of each quantized weight that the graph keeps as codes, by layer.
        codes_sha256: Hash of all quantized weights (`TrainingRecord.codes_sha256`); None where there is none.
    """

    sha256: str | None
    codes: Mapping[str, str]
    codes_sha256: str | None


def has_own_file(plan: ExportPlan) -> bool:
    """Whether what adapters bring into the graph has a data file of its own, beside the base's."""
    return plan.branch in ("fixed", "pooled") and not plan.lowered.parts


def base_facts(plan: ExportPlan) -> Mapping[str, Any] | None:
    """What the base's file is made of, but for the base itself. None where it holds an adapter too.

    Args:
        plan: Its weights wait for their values.
    """
    if plan.branch is None or plan.lowered.parts or plan.base.task == "module":
        return None
    merged, initializers = merged_adapter(plan.branch, plan.adapters), plan.lowered.graph.model.graph.initializers
    return {
        "versions": installed_versions("lora-deploy", "torch", "bitsandbytes"),
        "scheme": plan.base.scheme.model_dump_json(),
        "trained whole": hash_adapter(merged) if merged is not None else None,
        "tensors": [(name, *_describe(initializers[name])) for name in _base_tensors(plan)],
        "sources": {name: repr(source) for name, source in plan.lowered.graph.sources.items()},
        "coded": [weight.model_dump(exclude={"output"}) for weight in plan.lowered.coded],
    }


def describe_base(base: BaseData, facts: Mapping[str, Any] | None, base_sha256: str) -> dict[str, str]:
    """What the graph records of it, for `metadata_props`.

    Args:
        base: The file.
        facts: From `base_facts`.
        base_sha256: Of the base.
    """
    told = {"data_sha256": base.sha256, "base_data": _key(facts, base_sha256), "codes_sha256": base.codes_sha256}
    return {f"lora_deploy.{name}": value for name, value in told.items() if value is not None}


def keep_base(plan: ExportPlan, facts: Mapping[str, Any] | None, staging: Path) -> BaseData | None:
    """Let the new export have the data file of the one that it replaces, by another link, if it holds the same.

    Args:
        plan: Its base's initializers get their values.
        facts: From `base_facts`.
        staging: Where the new one is made.

    Returns:
        The file; None where there is none like it, or it is damaged: nothing was changed then.

    Raises:
        OutputError: There is no room for a copy, where the file system has no links.
    """
    file = plan.output / MODEL_NAME
    if facts is None or not file.is_file():
        return None
    try:
        graph = read_graph(file)
        entries = metadata_of(graph, file)
        if (
            entries.get("lora_deploy.base_data") != _key(facts, plan.base_sha256)
            or seal_of(MODEL_NAME, file.read_bytes()) is None
        ):
            return None
        sha256, coded = recorded_text(entries, "data_sha256", file), Manifest.read(entries, file).coded
        files = recorded_files(entries, file)
    except (InputError, OSError):  # it is to be replaced: what is wrong with it is nobody's concern
        return None
    stored = {tensor.name: tensor for tensor in graph.graph.initializer}
    initializers = plan.lowered.graph.model.graph.initializers
    waiting = {name: initializers[name] for name in _base_tensors(plan)}
    data = data_name(sha256)
    if files.get(data) != sha256 or not all(_fits(stored.get(name), value, data) for name, value in waiting.items()):
        return None
    if not _link_whole(plan.output / data, staging, sha256):
        return None
    for name, value in waiting.items():
        value.const_value = deserialize_tensor(stored[name], staging)
    codes = {module.name: module.sha256 for weight in coded for module in weight.modules}
    return BaseData(sha256, codes, entries.get("lora_deploy.codes_sha256"))


def _key(facts: Mapping[str, Any] | None, base_sha256: str) -> str | None:
    """One hash of all that the file is made of: the same hash, the same bytes."""
    if facts is None:
        return None
    return hashlib.sha256(json.dumps({**facts, "base": base_sha256}, sort_keys=True).encode()).hexdigest()


def _base_tensors(plan: ExportPlan) -> list[str]:
    """The initializers of the base's file and the small ones of the base, which are in the graph."""
    coded = [name for weight in plan.lowered.coded for name in (weight.codes, weight.scales)]
    constants = [] if has_own_file(plan) else large_constants(plan.lowered.graph.model)
    return [*plan.lowered.graph.sources, *coded, *constants]


def _fits(stored: onnx.TensorProto | None, value: ir.Value, data: str) -> bool:
    """Whether an older initializer is of the type and shape that is wanted, in the graph or in the data file."""
    if stored is None or stored.data_type != value.dtype or list(stored.dims) != list(_shape(value)):
        return False
    return all(entry.value == data for entry in stored.external_data if entry.key == "location")


def _link_whole(file: Path, staging: Path, sha256: str) -> bool:
    """Link a data file into a directory, if it is there and is what it was."""
    target = staging / file.name
    if file.is_symlink():
        return False
    try:
        link_or_copy(file, target)
        if hash_file(target) == sha256:
            return True
        target.unlink()
    except FileNotFoundError:
        pass
    except OSError as error:
        raise write_failure(target, error) from error
    return False


def _describe(value: ir.Value) -> tuple[str, list[int], str | None]:
    """Type, shape and, of a constant, a hash of its values."""
    assert value.dtype is not None
    constant = value.const_value
    sha256 = None if constant is None else hashlib.sha256(constant.tobytes()).hexdigest()
    return value.dtype.name, list(_shape(value)), sha256


def _shape(value: ir.Value) -> tuple[int, ...]:
    assert value.shape is not None
    return tuple(int(size) for size in value.shape.numpy())
