"""The parity suite on CUDA: every mode and precision, in float32, float16 and bfloat16, with the nodes really there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from lora_deploy.export import export_onnx
from tests.conftest import CheckpointFactory
from tests.gpu.profile import SHAPE_OPERATORS, operators_by_provider


def _why_not() -> str | None:
    try:
        import onnxruntime
    except ImportError:
        return "onnxruntime is not installed"
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        return "this onnxruntime has no CUDA: pip install onnxruntime-gpu in the place of onnxruntime"
    import torch

    return None if torch.cuda.is_available() else "there is no NVIDIA GPU"


_REASON = _why_not()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(_REASON is not None, reason=_REASON or "")]

_DTYPES = ("fp32", "fp16", "bf16")
# branch (None: merged), quantization of the base, precision (None: the base's own)
_BRANCHES = [
    (branch, method, precision)
    for branch in ("fixed", "hot-swap", "pooled")
    for method, precision in (
        ("none", None),
        ("nf4", None),
        ("fp4", None),
        ("int8", None),
        ("nf4", "int8"),
        ("nf4", "dense"),
    )
]


@pytest.mark.parametrize("dtype", _DTYPES)
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("method", ["none", "nf4", "int8"])
def test_merged_on_cuda(
    dtype: str,
    family: str,
    method: str,
    checkpoint_dir: CheckpointFactory,
    adapter_dir: Callable[..., Path],
    tmp_path: Path,
) -> None:
    options = {"precision": dtype, "quantization": method}
    _check(checkpoint_dir(family), adapter_dir(family), tmp_path, dtype, options)


@pytest.mark.parametrize("dtype", _DTYPES)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(("branch", "method", "precision"), _BRANCHES)
def test_a_branch_on_cuda(
    dtype: str,
    family: str,
    branch: str,
    method: str,
    precision: str | None,
    checkpoint_dir: CheckpointFactory,
    adapter_dir: Callable[..., Path],
    tmp_path: Path,
) -> None:
    adapters = {"one": adapter_dir(family)}
    if branch != "fixed":
        adapters["two"] = adapter_dir(family, r=9, lora_alpha=5, seed=2)
    options = {"merge": False, "branch": branch, "quantization": method}
    if precision == "dense" or method == "none":
        options["precision"] = dtype
    else:
        options |= {"precision": precision, "compute_dtype": dtype}
    _check(checkpoint_dir(family), adapters, tmp_path, dtype, options)


@pytest.mark.parametrize("dtype", _DTYPES)
@pytest.mark.parametrize("method", ["nf4", "int8"])
def test_codes_that_are_folded_on_opening_on_cuda(
    dtype: str, method: str, checkpoint_dir: CheckpointFactory, adapter_dir: Callable[..., Path], tmp_path: Path
) -> None:
    options = {"merge": False, "quantization": method, "expand": True, "compute_dtype": dtype}
    _check(checkpoint_dir("llama"), {"one": adapter_dir("llama")}, tmp_path, dtype, options)


def _check(base: Path, adapters: object, scratch: Path, dtype: str, options: dict[str, object]) -> None:
    """Export for CUDA, with the gate; then see that nothing but work on shapes ran elsewhere."""
    output = scratch / "out"
    result = export_onnx(base, adapters, output=output, provider="cuda", **options)  # type: ignore[arg-type]
    report = result.report
    assert report is not None
    assert report.passed
    assert report.control_failed
    assert report.provider == "cuda"
    assert report.notes == []
    assert report.precision in (dtype, "int8")
    for case in report.cases:
        assert case.control is None or case.control.mean_kl > 10 * float(report.tolerance["kl"] or 0)
    found = operators_by_provider(output, "cuda", scratch)
    elsewhere = set().union(*(ran for name, ran in found.items() if name != "CUDAExecutionProvider"))
    assert elsewhere <= SHAPE_OPERATORS
    assert {"MatMul", "Attention"} & found["CUDAExecutionProvider"]
