"""The ways to export that are worth trying for a base and a provider."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lora_deploy.errors import UsageError
from lora_deploy.native import load_kernels
from lora_deploy.requantize import Requantization
from lora_deploy.run.session import Weights
from lora_deploy.targets import ComputeDtype

__all__ = ["Candidate", "default_candidates"]

_FLOATS: Mapping[str, tuple[ComputeDtype, ...]] = {"cpu": ("fp32", "fp16"), "cuda": ("fp16", "bf16")}


@dataclass(frozen=True)
class Candidate:
    """A way to export and run.

    Attributes:
        name: What it is called in the table.
        flags: What says so on the command line of `lora-deploy export`.
        options: The same as keyword arguments of `export_onnx`. Candidates beside each other that have the same share
            an export.
        weights: How weights that are kept as codes run, as `OnnxSession` takes it.
    """

    name: str
    flags: tuple[str, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    weights: Weights = "stored"


def default_candidates(
    method: str, provider: Literal["cpu", "cuda"] = "cpu", calibration: Path | None = None
) -> list[Candidate]:
    """What is tried where nothing else is asked for; the first is small, for it stays open beside the others.

    Args:
        method: What the training base was: "none", "nf4", "fp4" or "int8".
        provider: What it will run on.
        calibration: JSONL text that merged int8 and int4 weights are rounded for; None for the training data.
    """
    floats = _FLOATS[provider]
    found = [
        _rounded("int4", calibration),
        _rounded("int4", calibration, budget_bits=5.25),
        _rounded("int4", calibration, correction=16),
        _rounded("int8", calibration),
        *(_merged(precision) for precision in floats),
    ]
    if method == "none":
        return found + [_branch(precision, "--precision", precision) for precision in floats]
    found.append(_branch(method))
    if provider == "cpu" and _compiles():
        found.append(Candidate(f"branch {method}, native", found[-1].flags, found[-1].options, "native"))
    return [*found, _branch(f"{method}, int8 adapter", "--adapter-precision", "int8")]


def _merged(precision: str) -> Candidate:
    return Candidate(
        f"merged {precision}", ("--merge", "--precision", precision), {"merge": True, "precision": precision}
    )


def _rounded(precision: Literal["int8", "int4"], calibration: Path | None, **options: Any) -> Candidate:
    """Merged weights as codes; `options` are of `Requantization`, and named on the command line alike."""
    told = {"budget_bits": "{} bits", "correction": "correction {}"}
    name = ", ".join([f"merged {precision}", *(told[key].format(value) for key, value in options.items())])
    flags = ["--merge", "--precision", precision]
    for key, value in options.items():
        flags += [f"--{key.replace('_', '-')}", str(value)]
    if calibration is not None:
        flags += ["--calibration", str(calibration)]
    requantization = Requantization(4 if precision == "int4" else 8, data=calibration, **options)
    return Candidate(name, tuple(flags), {"merge": True, "precision": precision, "requantization": requantization})


def _branch(name: str, *flags: str) -> Candidate:
    """A fixed branch; each flag is followed by its value."""
    values = {flag[2:].replace("-", "_"): value for flag, value in zip(flags[::2], flags[1::2], strict=True)}
    return Candidate(f"branch {name}", ("--branch", "--fixed", *flags), {"merge": False, "branch": "fixed", **values})


def _compiles() -> bool:
    """Whether our own kernels can be had on this machine."""
    try:
        load_kernels()
    except UsageError:
        return False
    return True
