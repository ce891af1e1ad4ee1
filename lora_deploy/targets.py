"""What an export can be made for: onnxruntime's providers, and what each of them can run of it.

Depends on nothing heavy: recipes are read with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, cast, get_args

from lora_deploy.errors import UsageError

__all__ = [
    "TARGETS",
    "ComputeDtype",
    "Precision",
    "Provider",
    "Target",
    "check_compute",
    "check_operators",
    "check_provider",
    "check_slots_run",
    "note_operators",
]

Precision = Literal["fp32", "fp16", "bf16", "nf4", "fp4", "int8", "int4"]
ComputeDtype = Literal["fp32", "fp16", "bf16"]
Provider = Literal["cpu", "cuda", "webgpu", "dml"]


@dataclass(frozen=True)
class Target:
    """What a provider can run.

    Attributes:
        compute: Types that it computes in, the default one first.
        lacks: Operators for codes that it has no kernel for. onnxruntime would run them on the CPU, and move what they
            read and write at every step, so that an export with one of them is refused.
        elsewhere: Other operators without a kernel: onnxruntime runs these on the CPU, which the user is told.
        empty_slots: Whether a product with an empty matrix is zero: what a hot-swap graph computes without an adapter.
    """

    compute: tuple[ComputeDtype, ...]
    lacks: frozenset[str] = frozenset()
    elsewhere: frozenset[str] = frozenset()
    empty_slots: bool = True


# From onnxruntime 1.32's kernel tables (docs/OperatorKernels.md, webgpu_contrib_kernels.cc, OperatorRegistration.cpp).
TARGETS: Mapping[Provider, Target] = {
    # fp16 runs too: through casts to fp32, but for the products of codes, which have kernels of their own.
    "cpu": Target(compute=("fp32", "fp16")),
    "cuda": Target(compute=("fp16", "fp32", "bf16")),
    # MatMulBnb4 since 1.32; GatherBlockQuantized and MatMulNBits for 4 and 8 bits. FusedMatMul, which float weights are
    # multiplied by, has no kernel.
    "webgpu": Target(compute=("fp16", "fp32"), elsewhere=frozenset({"FusedMatMul"})),
    # MatMulNBits for 4 and 8 bits, FusedMatMul and QuickGelu are there. Standard operators are known up to opset 21.
    # An operator with an empty input returns without having written its output.
    "dml": Target(
        compute=("fp16", "fp32"),
        lacks=frozenset({"MatMulBnb4", "GatherBlockQuantized"}),
        elsewhere=frozenset({"Attention", "RMSNormalization", "RotaryEmbedding"}),
        empty_slots=False,
    ),
}

_REMEDIES = {
    "MatMulBnb4": "add --expand, which needs standard operators only, or take --merge or --provider webgpu",
    "GatherBlockQuantized": "add --head-precision float, or take --provider webgpu",
}


def check_provider(provider: str) -> Provider:
    """The provider, if there is such a one; raises UsageError."""
    names = get_args(Provider)
    if provider not in names:
        raise UsageError(
            "there is no such provider", found=provider, expected=f"{', '.join(names[:-1])} or {names[-1]}"
        )
    return cast(Provider, provider)


def check_compute(dtype: str | None, provider: Provider) -> None:
    """Whether a provider computes in this type, if it is one that is computed in; raises UsageError."""
    if dtype in get_args(ComputeDtype) and dtype not in TARGETS[provider].compute:
        able = [name for name, target in TARGETS.items() if dtype in target.compute]
        raise UsageError(
            f"onnxruntime's {provider} provider does not compute in {dtype}",
            found=f"{dtype} with --provider {provider}",
            expected=" or ".join(TARGETS[provider].compute),
            remedy=f"take one of these, or --provider {' or '.join(able)}",
        )


def check_operators(needed: Mapping[str, str], provider: Provider) -> None:
    """Whether a provider has the operators that an export's codes need.

    Args:
        needed: What was asked for, by the operator that it needs.
        provider: The provider.

    Raises:
        UsageError: It has no kernel for one of them.
    """
    for operator, asked in needed.items():
        if operator in TARGETS[provider].lacks:
            raise UsageError(
                f"onnxruntime's {provider} provider has no kernel for what this needs",
                found=f"{asked} with --provider {provider}",
                expected=f"a provider with {operator}: "
                + ", ".join(name for name, target in TARGETS.items() if operator not in target.lacks),
                remedy=_REMEDIES[operator],
            )


def check_slots_run(branch: str | None, provider: Provider) -> None:
    """Whether a provider can run a graph whose slots may be empty; raises UsageError."""
    if branch == "hot-swap" and not TARGETS[provider].empty_slots:
        raise UsageError(
            f"onnxruntime's {provider} provider computes nothing from the empty slots of a graph without an adapter",
            found=f"--branch with --provider {provider}",
            expected="--merge, --branch --fixed, or --branch --pool",
            remedy="add --fixed or --pool, or take --provider webgpu",
        )


def note_operators(operators: frozenset[str], provider: Provider) -> str | None:
    """What of a graph's operators onnxruntime will run on the CPU; None where it is nothing."""
    found = sorted(operators & TARGETS[provider].elsewhere)
    if not found:
        return None
    return f"onnxruntime's {provider} provider has no kernel for {', '.join(found)}, and runs it on the CPU"
