"""What an export can be asked for, and which options go together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal, cast, get_args

from lora_deploy.adapter import LoraAdapter, TrainingRecord
from lora_deploy.errors import AdapterError, UsageError
from lora_deploy.export.onnx_adapter import check_name
from lora_deploy.manifest import BranchKind
from lora_deploy.quantization import QuantizationScheme
from lora_deploy.quantization.base import TrainingBase
from lora_deploy.requantize.options import Requantization
from lora_deploy.targets import (
    TARGETS,
    ComputeDtype,
    Precision,
    Provider,
    check_compute,
    check_operators,
    check_provider,
    check_slots_run,
)
from lora_deploy.task import Task, is_classification

__all__ = [
    "ComputeDtype",
    "Precision",
    "Provider",
    "check_adapter_precision",
    "check_branch",
    "check_codes_run",
    "check_precision",
    "check_provider",
    "check_requantization",
    "choose_accuracy_level",
    "choose_types",
    "note_head",
    "training_scheme",
]


def check_branch(branch: str | None, named: Mapping[str, Path]) -> BranchKind | None:
    """The kind of branch, if it goes with the number and the names of the adapters; raises UsageError."""
    for name in named if branch not in (None, "fixed") else ():
        check_name(name)
    if branch is None:
        if len(named) > 1:
            raise UsageError(
                "only one adapter can be merged", found=", ".join(named), remedy="add --branch, or give one --adapter"
            )
        return None
    if branch not in get_args(BranchKind):
        raise UsageError("there is no such branch", found=branch, expected=", ".join(get_args(BranchKind)))
    if branch == "fixed" and len(named) != 1:
        raise UsageError(
            "a fixed branch is of one adapter", found=", ".join(named) or "none", remedy="give one --adapter"
        )
    if branch == "pooled" and not named:
        raise UsageError("a pool needs adapters", remedy="give one --adapter NAME=DIR or more")
    return cast(BranchKind, branch)


def check_adapter_precision(precision: str | None, branch: BranchKind | None) -> None:
    """Whether A and B can be stored this way in such a branch; raises UsageError."""
    if precision not in (None, "int8"):
        raise UsageError(
            "there is no such precision of adapters",
            found=precision,
            expected="int8",
            remedy="leave --adapter-precision out, for floats of the type that the graph computes in",
        )
    if precision is not None and branch not in ("fixed", "hot-swap"):
        raise UsageError(
            "only an adapter that is a branch of its own is stored in int8",
            found=f"--adapter-precision {precision} {'--branch --pool' if branch else '--merge'}",
            expected="--branch, or --branch --fixed",
            remedy="leave --adapter-precision out",
        )


def note_head(base: TrainingBase, adapters: Iterable[LoraAdapter], recorded: bool) -> str | None:
    """What is taken for granted of a classifier's head, where nothing says whether training quantized it.

    transformers quantizes it unless `llm_int8_skip_modules` names it. An adapter that trains it whole needs it in
    floats; beside any other it may have been either, and a checkpoint in full precision does not tell.

    Args:
        base: The training base.
        adapters: Its adapters.
        recorded: Whether lora-deploy trained them, and so left the head in floats.
    """
    if not is_classification(base.task) or base.prequantized or base.scheme.method == "none" or recorded:
        return None
    whole = {name for adapter in adapters for name in adapter.parameters}
    unknown = [head for head in base.heads if f"{head}.weight" not in whole]
    if not unknown:
        return None
    return (
        f"the head ({', '.join(unknown)}) is taken to have been in floats in training, as with llm_int8_skip_modules; "
        "if it was quantized too, save the quantized model with save_pretrained() and export from that"
    )


def check_precision(precision: str | None, branch: str | None, provider: Provider) -> None:
    """What can be said before the base is looked at."""
    codes = ("int8", "int4") if branch is None else ("nf4", "fp4", "int8")
    allowed = (*get_args(ComputeDtype), *codes)
    if precision is not None and precision not in allowed:
        raise UsageError(
            "there is no such precision"
            if precision not in get_args(Precision)
            else f"this precision needs {'--branch' if branch is None else '--merge'}",
            found=precision,
            expected=", ".join(allowed),
        )
    check_compute(precision, provider)
    check_slots_run(branch, provider)


def check_codes_run(
    precision: str | None,
    branch: str | None,
    provider: Provider,
    expand: bool,
    requantization: Requantization | None = None,
    task: Task = "causal-lm",
) -> None:
    """Whether the provider has the operators that read the codes; raises UsageError.

    Called with what was asked for before the base is looked at, and again when the base has decided the rest.
    """
    needed = {}
    if branch is not None and precision in ("nf4", "fp4") and not expand:
        needed["MatMulBnb4"] = f"--branch with weights in {precision}"
    # A classifier's embedding stays in floats.
    if requantization is not None and requantization.head is not None and task == "causal-lm":
        needed["GatherBlockQuantized"] = f"--head-precision int{requantization.head}"
    check_operators(needed, provider)


def choose_types(
    base: TrainingBase,
    precision: str | None,
    compute_dtype: str | None,
    branch: BranchKind | None,
    provider: Provider,
    expand: bool,
) -> tuple[Precision, ComputeDtype]:
    """Type of the weights and of the computation."""
    default = TARGETS[provider].compute[0]
    own = base.scheme.method
    if precision is None:
        precision = own if branch is not None and own != "none" else compute_dtype or default
    if compute_dtype not in (None, *get_args(ComputeDtype)):
        raise UsageError(
            "there is no such type to compute in", found=compute_dtype, expected=", ".join(get_args(ComputeDtype))
        )
    check_compute(compute_dtype, provider)
    if precision in get_args(ComputeDtype):
        if compute_dtype not in (None, precision):
            raise UsageError(
                "a graph computes in the type of its float weights",
                found=f"--precision {precision} --compute-dtype {compute_dtype}",
                remedy="leave --compute-dtype out",
            )
        compute_dtype = precision
    elif branch is not None and (own == "none" or precision not in (own, "int8")):
        raise UsageError(
            "the base was not trained in this precision, and to quantize it anew would lose what was learnt",
            found=f"--precision {precision}, of a base in {own}",
            expected=", ".join(dict.fromkeys([*([] if own == "none" else [own, "int8"]), *get_args(ComputeDtype)])),
            remedy="leave --precision out",
        )
    if expand and (precision != own or branch is None):
        raise UsageError(
            "only the base's own codes can be expanded",
            found=f"--precision {precision} --expand, of a base in {own}",
            remedy="leave --expand or --precision out",
        )
    return cast(Precision, precision), cast(ComputeDtype, compute_dtype or default)


def choose_accuracy_level(
    level: int | None, precision: Precision, branch: BranchKind | None, provider: Provider, expand: bool
) -> int:
    """MatMulNBits' accuracy level: by default 4 for merged weights on a CPU, where level 0 is slow, else 0."""
    if level is None:
        return 4 if branch is None and precision in ("int8", "int4") and provider == "cpu" else 0
    if level not in (0, 4):
        raise UsageError("there is no such accuracy level", found=level, expected="0 or 4")
    if level and (precision not in ("int8", "int4") or expand):
        raise UsageError(
            "only products of int8 and int4 codes have an accuracy level",
            found=f"--accuracy-level {level} --precision {precision}{' --expand' if expand else ''}",
            remedy="leave --accuracy-level out, or add --precision int8",
        )
    return level


def check_requantization(
    requantization: Requantization | None, precision: Precision, branch: BranchKind | None
) -> Requantization | None:
    """How merged weights become codes, where they do; raises UsageError."""
    if branch is not None or precision not in ("int8", "int4"):
        if requantization is not None:
            raise UsageError(
                "only merged weights are made into codes anew",
                found=f"--precision {precision}{' --branch' if branch else ''}",
                expected="--merge --precision int8 or int4",
                remedy="leave out what says how",
            )
        return None
    bits: Literal[4, 8] = 4 if precision == "int4" else 8
    if requantization is None:
        return Requantization(bits)
    if requantization.bits != bits:
        raise UsageError(
            "the precision contradicts how it is made", found=f"{requantization.bits} bits", expected=f"{bits} bits"
        )
    return requantization


def training_scheme(
    quantization: str, double_quant: bool, records: Mapping[str, TrainingRecord]
) -> QuantizationScheme | None:
    """The scheme of training: asked for, or recorded by all adapters alike."""
    if quantization not in ("auto", "none", "nf4", "fp4", "int8"):
        raise UsageError("there is no such quantization", found=quantization, expected="auto, none, nf4, fp4 or int8")
    first = next(iter(records), None)
    recorded = records[first].quantization if first is not None else None
    for name, record in records.items():
        if record.quantization != recorded:
            raise AdapterError(
                "the adapters were trained on bases of different quantizations",
                tensor=name,
                found=record.quantization,
                expected=f"{recorded}, as {first}",
                remedy="export them apart",
            )
    method = recorded.method if recorded else "none"
    asked = QuantizationScheme(
        method=method if quantization == "auto" else cast(Literal["none", "nf4", "fp4", "int8"], quantization),
        double_quant=double_quant,
    )
    # Double quantization is the default, so only asking for none can contradict the record.
    if recorded and (
        recorded.method != asked.method or (asked.is_4bit and recorded.double_quant and not asked.double_quant)
    ):
        raise AdapterError(
            "the adapter was trained on a base of another quantization than the one asked for",
            found=asked,
            expected=recorded,
            remedy="leave --quantization and --no-double-quant out",
        )
    return recorded or (None if quantization == "auto" else asked)
