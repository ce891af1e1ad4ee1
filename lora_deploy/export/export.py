"""An adapter and its base become a directory that onnxruntime opens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lora_deploy.entries import recorded_adapters
from lora_deploy.errors import UsageError
from lora_deploy.export.commit import commit, staging_directory
from lora_deploy.export.merge import MergedParameters, merged_adapter
from lora_deploy.export.module import Examples, plan_module
from lora_deploy.export.module_base import ModuleBase
from lora_deploy.export.options import note_head
from lora_deploy.export.output import check_output, check_space
from lora_deploy.export.plan import ExportPlan, plan_export
from lora_deploy.export.source import SourceChoice
from lora_deploy.export.ties import note_ties
from lora_deploy.export.write import OnProgress, calibration_texts, write_export
from lora_deploy.integrity import MODEL_NAME, base_key, find_adapters
from lora_deploy.manifest import BranchKind
from lora_deploy.places import remember_place
from lora_deploy.requantize.budget import spend_budget
from lora_deploy.requantize.options import Requantization
from lora_deploy.targets import note_operators

if TYPE_CHECKING:
    from lora_deploy.verify import ParityReport

__all__ = ["ExportResult", "export_onnx"]


@dataclass(frozen=True)
class ExportResult:
    """What an export left.

    Attributes:
        output: The directory.
        bytes: Size of `model.onnx`, its data, and its adapters.
        report: The parity report; None where it was not asked for.
        warnings: What the user should know.
        graph: Where the graph came from, and why.
        kept_base: Whether the base's weights are the file of the export that was replaced.
    """

    output: Path
    bytes: int
    report: ParityReport | None
    warnings: tuple[str, ...] = ()
    graph: SourceChoice | None = None
    kept_base: bool = False


def export_onnx(
    model: str | Path | torch.nn.Module,
    adapter: str | Path | Mapping[str, str | Path] | None = None,
    *,
    output: str | Path,
    merge: bool = True,
    branch: BranchKind | None = None,
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
    verify: bool = True,
    data: Path | None = None,
    max_kl: float | None = None,
    example_inputs: Examples | None = None,
    dynamic_axes: Mapping[str, Mapping[int, str]] | None = None,
    on_progress: OnProgress = lambda task, done, total: None,
) -> ExportResult:
    """Export an adapter and its training base to ONNX, and prove that the result computes what was trained.

    Args:
        model: The training base: a local directory or a hub id; or a torch module in memory (see `plan_module`), whose
            graph is traced.
        adapter: Directory of the adapter, or of several by name (not to merge); None to export the base alone, and of a
            module the adapter that is on it.
        output: Directory to write.
        merge: Merge the adapter into the dequantized weights. If not, the base keeps its own codes and the adapter
            stands beside it.
        branch: How, then: "hot-swap", which is None too, "fixed" or "pooled".
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
        quantization: What the training base was: "none", "nf4", "fp4", "int8", or "auto".
        double_quant: Whether nf4 and fp4 were double-quantized.
        graph: Where the graph comes from: "mobius", "traced" from transformers' code, or "auto" to decide.
        provider: "cpu", "cuda", "webgpu" or "dml".
        overwrite: Replace an export that is there already.
        verify: Run the parity gate before anything is committed.
        data: JSONL text to compare deployed with trained weights on; None for the training data, where it is known.
        max_kl: The gate also asks that they differ by no more, in nats a token, on any text; None for no limit.
        example_inputs: Of a module: a tensor, one for each argument of `forward`, or tensors by the arguments' names.
        dynamic_axes: Of a module: the dimensions of its inputs that may have any size, as {"x": {0: "batch"}}; None for
            the first of each.
        on_progress: Is told the task, how much is done and of how much.

    Returns:
        What was written.

    Raises:
        UsageError, InputError: As `plan_export`; nothing was written.
        ParityError: The staged export does not compute what was trained; nothing was committed.
        OutputError: It could not be written; what was there before is unchanged.
    """
    if merge and branch is not None:
        raise UsageError(
            "an adapter is merged, or it is a branch", found=f"branch={branch!r}, merge=True", remedy="say merge=False"
        )
    from lora_deploy.verify.report import check_comparison

    check_comparison(data, max_kl)
    planner: Callable[..., ExportPlan] = plan_export
    if isinstance(model, torch.nn.Module):
        planner = partial(plan_module, example_inputs=example_inputs, dynamic_axes=dynamic_axes, data=data)
    elif example_inputs is not None or dynamic_axes is not None:
        raise UsageError("only a torch module needs examples of its inputs", found=model, remedy="leave them out")
    make_plan = partial(
        planner,
        model,
        adapter,
        output,
        branch=None if merge else branch or "hot-swap",
        precision=precision,
        compute_dtype=compute_dtype,
        expand=expand,
        accuracy_level=accuracy_level,
        cache=cache,
        adapter_precision=adapter_precision,
        quantization=quantization,
        double_quant=double_quant,
        graph=graph,
        provider=provider,
        overwrite=overwrite,
    )
    plan = make_plan(requantization=requantization)
    with staging_directory(plan.output) as staging:
        check_output(plan.output, overwrite, [])  # somebody else may have written there meanwhile
        calibrated = plan.requantization is not None and plan.requantization.rows
        check_space(staging, plan.expected_bytes * (2 if calibrated else 1))
        if plan.requantization is not None and plan.requantization.budget_bits is not None:
            on_progress("choosing layers", 0, 1)
            parameters = MergedParameters(plan.base, merged_adapter(plan.branch, plan.adapters))
            plan = make_plan(requantization=spend_budget(plan.requantization, parameters, calibration_texts(plan)))
        written = write_export(plan, staging, on_progress)
        warnings = _warnings(plan, written.codes_sha256)
        report = _prove(plan, staging, data, max_kl, on_progress) if verify else None
        commit(staging, plan.output)
    _remember(plan)
    size = sum(file.stat().st_size for file in plan.output.rglob("*.onnx*"))
    return ExportResult(plan.output, size, report, warnings, plan.graph_source, written.kept_base)


def _remember(plan: ExportPlan) -> None:
    """Where base and adapters are, for `verify`."""
    entries = plan.lowered.graph.model.metadata_props
    if plan.base.task != "module":
        remember_place(base_key(entries), plan.base.directory)
    for name, recorded in recorded_adapters(entries, plan.output / MODEL_NAME).items():
        if plan.adapters[name].source:
            remember_place(recorded["sha256"], plan.adapters[name].source)


def _warnings(plan: ExportPlan, codes_sha256: str | None) -> tuple[str, ...]:
    """What the user should know, looked at before the commit."""
    warnings = []
    if not all(record.codes_sha256 in (None, codes_sha256) for record in plan.records.values()):
        warnings.append(
            "the quantized weights are not bit for bit those of the training: same checkpoint, but another device or "
            "version of bitsandbytes rounded some of them differently"
        )
    graphs = [lowered.graph.model for lowered in (plan.lowered, *plan.lowered.parts.values())]
    operators = frozenset(node.op_type for model in graphs for node in model.graph)
    note = note_operators(operators, plan.provider)
    head = note_head(plan.base, plan.adapters.values(), bool(plan.records))
    warnings += [found for found in (note, head) if found is not None]
    warnings += note_ties(plan.base, plan.adapters.values(), plan.branch)
    gone = sorted(set(find_adapters(plan.output)) - (set(plan.adapters) if plan.branch == "hot-swap" else set()))
    if gone:
        warnings.append(f"the older export's adapters are not in the new one: {', '.join(gone)}; convert them again")
    return tuple(warnings)


def _prove(
    plan: ExportPlan, staging: Path, data: Path | None, max_kl: float | None, on_progress: OnProgress
) -> ParityReport:
    from lora_deploy.pages.parity_page import save_report
    from lora_deploy.verify import check_module, check_parity

    if isinstance(plan.base, ModuleBase):
        report = check_module(
            staging, plan.base, plan.adapters, provider=plan.provider, max_kl=max_kl, on_progress=on_progress
        )
    else:
        report = check_parity(
            staging,
            plan.base,
            plan.adapters,
            provider=plan.provider,
            data=data,
            training_data=[record.data for record in plan.records.values()],
            max_kl=max_kl,
            on_progress=on_progress,
        )
    save_report(staging, report, {name: lora.source for name, lora in plan.adapters.items()})
    report.require(plan.output)
    return report
