"""Any torch module with its adapter: the plan of an export whose graph is traced from the module itself."""

from __future__ import annotations

import inspect
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn

from lora_deploy.adapter import LoraAdapter, adapter_of, read_adapter
from lora_deploy.adapter.packing import check_slots
from lora_deploy.errors import AdapterError, CheckpointError, UsageError
from lora_deploy.export.coded import CodedBase
from lora_deploy.export.graph import Graph, as_unsupported
from lora_deploy.export.lower import Branches, lower_graph
from lora_deploy.export.merge import drop_copies
from lora_deploy.export.module_base import ModuleBase
from lora_deploy.export.options import (
    ComputeDtype,
    check_branch,
    check_codes_run,
    check_precision,
    check_provider,
    choose_accuracy_level,
    choose_types,
)
from lora_deploy.export.output import check_output
from lora_deploy.export.outputs import OutputChanges
from lora_deploy.export.plan import ONNX_DTYPES, ExportPlan
from lora_deploy.export.source import SourceChoice
from lora_deploy.export.ties import check_tables
from lora_deploy.export.traced import DTYPES, finish_trace, trace_module
from lora_deploy.layers.model import adapted_layers
from lora_deploy.manifest import BranchKind
from lora_deploy.slots import Slot

__all__ = ["Examples", "name_outputs", "plan_module"]

# One tensor, one for each argument of `forward`, or by the arguments' names.
Examples = torch.Tensor | Sequence[torch.Tensor] | Mapping[str, torch.Tensor]
_REMEDY = (
    "run torch.onnx.export(module, (), kwargs=inputs, dynamo=True, dynamic_shapes=...) on its own to see where: no "
    "branch may depend on values, and no size that is named dynamic may become a number. Or export the submodule that "
    "holds the adapted layers"
)


def plan_module(
    module: nn.Module,
    adapter: str | Path | Mapping[str, str | Path] | None,
    output: str | Path,
    *,
    example_inputs: Examples | None,
    dynamic_axes: Mapping[str, Mapping[int, str]] | None = None,
    branch: str | None = None,
    precision: str | None = None,
    compute_dtype: str | None = None,
    expand: bool = False,
    provider: str = "cpu",
    overwrite: bool = False,
    **others: Any,
) -> ExportPlan:
    """Check that the export of a module can be made and prepare its graph. Nothing is written.

    Args:
        module: The module: without an adapter, or one that `get_lora_model` returned.
        adapter: Directory of the adapter, or of several by name; None for the one that is on the module, if there is.
        output: Directory to write.
        example_inputs: A tensor, one for each argument of `forward`, or by the arguments' names; on the first dimension
            the batch.
        dynamic_axes: Which dimensions of which input may have any size: {"x": {0: "batch", 1: "length"}}. None for the
            first of each, the batch.
        branch, precision, compute_dtype, expand, provider, overwrite: As `plan_export` takes them.
        **others: Options of `plan_export` that a module does not take; anything but their defaults is refused.

    Raises:
        UsageError: The options contradict each other, or there is no example.
        InputError: The adapter does not fit the module, or torch cannot trace it.
        OutputError: The output exists.
    """
    _refuse(others)
    live = bool(adapted_layers(module))
    named = _named(adapter, live)
    checked = check_provider(provider)
    kind = check_branch(branch, {name: path or Path(name) for name, path in named.items()})
    if kind == "pooled":
        raise UsageError(
            "the adapters of a module cannot be pooled: which of a layer's rows are of one of the batch is not known",
            found="branch='pooled'",
            remedy="export with merge=False (hot-swap), or each adapter with branch='fixed'",
        )
    check_precision(precision, kind, checked)
    if precision in ("int8", "int4"):
        raise UsageError("a module keeps its weights as they are, or in floats", found=f"precision={precision!r}")
    output = check_output(output, overwrite, [path for path in named.values() if path is not None])
    base = ModuleBase(module, name_inputs(module, example_inputs))
    read = {name: adapter_of(module) if path is None else read_adapter(path, lazy=True) for name, path in named.items()}
    shapes = {name: layer.shape for name, layer in base.linears.items()}
    for lora in read.values():
        lora.check_against(base.shapes, shapes)
        check_tables(lora, base)
    adapters = {name: drop_copies(lora, base) for name, lora in read.items()}
    weights, compute = choose_types(base, precision, compute_dtype, kind, checked, expand)
    check_codes_run(weights, kind, checked, expand, None, base.task)
    coded = None
    if kind is not None and weights not in get_args(ComputeDtype):
        whole = frozenset(name.removesuffix(".weight") for lora in adapters.values() for name in lora.parameters)
        level = choose_accuracy_level(None, weights, kind, checked, expand)
        coded = CodedBase(base, weights, expand, ONNX_DTYPES[compute], level, whole)
    graph = _trace(base, compute, dynamic_axes)
    _check_reached(graph, adapters)
    outputs = None
    if kind in (None, "fixed") and adapters:
        outputs = OutputChanges(next(iter(adapters.values())), {}, beside=kind is not None)
    lowered = lower_graph(graph, coded, _branches(base, kind, adapters), outputs)
    if kind is not None:
        _check_one_product(lowered.slots, adapters)
        for lora in adapters.values():
            check_slots(lowered.slots, lora.only_updates() if kind == "fixed" else lora)
    waiting = [value for value in lowered.graph.model.graph.initializers.values() if value.const_value is None]
    expected = sum(math.ceil(v.dtype.itemsize * math.prod(v.shape.numpy())) for v in waiting if v.dtype and v.shape)
    description = f"torch module {type(module).__module__}.{type(module).__qualname__}"
    source = SourceChoice("traced", "a torch module")
    return ExportPlan(
        description, base, kind, adapters, {}, weights, compute, checked, output, lowered, expected, source
    )


def _refuse(others: Mapping[str, Any]) -> None:
    """What has no meaning for a module, or is not made for one."""
    harmless = {"quantization": ("auto",), "double_quant": (True,), "graph": ("auto", "traced")}
    given = [name for name, value in others.items() if value not in harmless.get(name, (None,))]
    if given:
        raise UsageError(
            "a module does not take this option",
            found=", ".join(given),
            remedy="leave it out; quantize_model(module, 'nf4') quantizes a module, before its adapter is trained",
        )


def _named(adapter: str | Path | Mapping[str, str | Path] | None, live: bool) -> dict[str, Path | None]:
    """Where each adapter is, by name; None for the module's own."""
    if live and adapter is not None:
        raise UsageError(
            "the module has an adapter already",
            found=adapter,
            remedy="give the module without its adapter, or leave adapter= out to export the one that is on it",
        )
    if adapter is None:
        return {"default": None} if live else {}
    if isinstance(adapter, Mapping):
        return {name: Path(directory) for name, directory in adapter.items()}
    return {Path(adapter).resolve().name: Path(adapter)}


def name_inputs(module: nn.Module, examples: Examples | None) -> dict[str, torch.Tensor]:
    """Examples by the names of `forward`'s arguments.

    Raises:
        UsageError: There is none, one is no tensor, or its argument has no name.
    """
    if isinstance(examples, Mapping):
        named: dict[str, Any] = dict(examples)
    else:
        values = [examples] if isinstance(examples, torch.Tensor) else list(examples or ())
        kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        parameters = inspect.signature(module.forward).parameters.values()
        names = [parameter.name for parameter in parameters if parameter.kind in kinds]
        named = dict(zip(names, values, strict=False)) if len(names) >= len(values) else {}
    if not named or not all(isinstance(value, torch.Tensor) for value in named.values()):
        raise UsageError(
            "a module needs an example of each of its inputs",
            found=f"example_inputs of {type(examples).__name__}",
            expected="a tensor, one tensor for each argument of forward, or tensors by the arguments' names",
            remedy="export_onnx(module, example_inputs={'x': torch.randn(2, 16)}, output=...)",
        )
    return {name: value.detach().cpu() for name, value in named.items()}


def name_outputs(result: Any) -> dict[str, torch.Tensor]:
    """What a module returned, by name: its own names, "output", or "output_0" and so on.

    Raises:
        UsageError: It returns something else than tensors.
    """
    if isinstance(result, torch.Tensor):
        return {"output": result}
    if isinstance(result, Mapping):
        found = dict(result)
    elif isinstance(result, (tuple, list)):
        found = {f"output_{number}": value for number, value in enumerate(result)}
    else:
        found = {"output": result}
    for name, value in found.items():
        if not isinstance(value, torch.Tensor):
            raise UsageError(
                "a module must return tensors",
                found=f"{name} is of {type(value).__name__}",
                expected="a tensor, a tuple of tensors, or tensors by name",
                remedy="wrap it in a module whose forward picks the tensors that are wanted",
            )
    return found


def _trace(base: ModuleBase, compute: str, axes: Mapping[str, Mapping[int, str]] | None) -> Graph:
    """The graph of the module, for every size of the dimensions that are named."""
    dtype = DTYPES[compute]
    axes = {name: {0: "batch"} for name, value in base.inputs.items() if value.ndim} if axes is None else axes
    inputs = {name: _at_least_two(value, axes.get(name, {})) for name, value in base.inputs.items()}
    inputs = {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}
    plain = base.plain_module(dtype)
    file = base.directory
    try:
        with torch.no_grad():
            outputs = list(name_outputs(plain(**inputs)))
        with as_unsupported("of the module", file):
            traced = trace_module(plain, inputs, axes, outputs)
    except CheckpointError as error:
        error.details |= {"remedy": _REMEDY}
        error.details.pop("tensor", None)
        raise
    except UsageError:
        raise
    except Exception as error:
        raise CheckpointError(
            "the module does not run on its example",
            file=file,
            found=f"{type(error).__name__}: {error}".splitlines()[0][:300],
            remedy="give example_inputs that module(**example_inputs) takes",
        ) from error
    for value in traced.graph.inputs:
        for dim, name in axes.get(str(value.name), {}).items():
            if value.shape is None or isinstance(value.shape[dim], int):
                raise CheckpointError(
                    "the traced graph is for one size only",
                    file=file,
                    tensor=f"{value.name}, {name}",
                    found=value.shape,
                    remedy=_REMEDY,
                )
    return finish_trace(traced, type(base.module).__name__, plain.state_dict())


def _at_least_two(value: torch.Tensor, axes: Mapping[int, str]) -> torch.Tensor:
    """torch takes a size of 1 for a constant."""
    for dim in axes:
        if value.shape[dim] == 1:
            value = torch.cat([value, value], dim=dim)
    return value


def _check_reached(graph: Graph, adapters: Mapping[str, LoraAdapter]) -> None:
    """Whatever an adapter changes must be in the graph: torch leaves out what the example does not run through."""
    read = {segment.parameter for source in graph.sources.values() for segment in source.segments}
    for lora in adapters.values():
        for name in [*(f"{module}.weight" for module in (*lora.updates, *lora.tables)), *lora.parameters]:
            if name not in read:
                raise AdapterError(
                    "the adapter changes something that the traced graph does not read",
                    file=lora.source,
                    tensor=name,
                    remedy="give example_inputs that run through every adapted layer, and a module without tied layers "
                    "where the adapter changes one of them",
                )


def _check_one_product(slots: Sequence[Slot], adapters: Mapping[str, LoraAdapter]) -> None:
    """A branch has one place in the graph."""
    runs = Counter(module for slot in slots for module in slot.modules)
    for lora in adapters.values():
        for name in lora.updates:
            if runs[name] != 1:
                raise AdapterError(
                    "the adapter changes a layer that is not one product in the graph: a branch has no place beside it",
                    file=lora.source,
                    tensor=name,
                    found="a layer that runs more than once, or not as a plain product",
                    remedy="export with merge=True",
                )


def _branches(base: ModuleBase, kind: BranchKind | None, adapters: Mapping[str, LoraAdapter]) -> Branches | None:
    if kind is None:
        return None
    updated = {name for lora in adapters.values() for name in lora.updates}
    targets = updated | set(base.linears) if kind == "hot-swap" else updated
    return Branches(kind, tuple(adapters.values()), targets, {})
