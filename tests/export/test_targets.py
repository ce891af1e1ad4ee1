"""What a provider cannot run is refused before anything is written; what it can is exported, and checked on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from lora_deploy.errors import UsageError
from lora_deploy.export import export_onnx, plan_export
from lora_deploy.requantize import Requantization
from lora_deploy.targets import TARGETS, note_operators
from lora_deploy.verify import verify
from tests.conftest import CheckpointFactory
from tests.export.conftest import SHORT, BranchFactory

Plan = Callable[..., Any]


@pytest.fixture
def planned(checkpoint_dir: CheckpointFactory, adapter_dir: Callable[..., Path], tmp_path: Path) -> Plan:
    """`planned(**options)`: a plan for a tiny QLoRA adapter."""

    def plan(**options: Any) -> Any:
        base = checkpoint_dir("llama", **SHORT["llama"])
        return plan_export(base, {"own": adapter_dir("llama")}, tmp_path / "out", **({"quantization": "nf4"} | options))

    return plan


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"provider": "cpu", "precision": "bf16"}, ["bf16 with --provider cpu", "fp32 or fp16", "--provider cuda"]),
        ({"provider": "webgpu", "precision": "bf16"}, ["bf16 with --provider webgpu", "fp16 or fp32"]),
        ({"provider": "dml", "precision": "bf16"}, ["bf16 with --provider dml", "fp16 or fp32"]),
        ({"provider": "dml", "branch": "fixed", "precision": "nf4"}, ["MatMulBnb4: cpu, cuda, webgpu", "--expand"]),
        ({"provider": "dml", "branch": "pooled", "precision": "fp4"}, ["weights in fp4", "--merge or --provider"]),
        ({"provider": "dml", "branch": "hot-swap"}, ["--branch with --provider dml", "--fixed or --pool"]),
    ],
)
def test_it_is_refused_before_the_model_is_looked_at(options: dict[str, Any], named: list[str], tmp_path: Path) -> None:
    """Neither the model nor the adapter is there."""
    with pytest.raises(UsageError) as caught:
        plan_export("none", {"one": "none"}, tmp_path / "out", **options)
    for text in named:
        assert text in str(caught.value)
    assert caught.value.details.keys() == {"found", "expected", "remedy"}
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"branch": "fixed"}, ["weights in nf4", "MatMulBnb4"]),
        ({"precision": "int4"}, ["--head-precision int8", "GatherBlockQuantized", "--head-precision float"]),
        ({"precision": "int8", "requantization": Requantization(8, head=4)}, ["--head-precision int4"]),
        ({"branch": "fixed", "compute_dtype": "bf16", "precision": "int8"}, ["does not compute in bf16"]),
    ],
)
def test_what_the_base_decides_is_refused_before_work_begins(
    options: dict[str, Any], named: list[str], planned: Plan, tmp_path: Path
) -> None:
    with pytest.raises(UsageError) as caught:
        planned(provider="dml", **options)
    for text in named:
        assert text in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"provider": "webgpu"}, ("fp16", "fp16")),
        ({"provider": "webgpu", "branch": "hot-swap"}, ("nf4", "fp16")),
        ({"provider": "webgpu", "branch": "pooled", "compute_dtype": "fp32"}, ("nf4", "fp32")),
        ({"provider": "webgpu", "precision": "int4"}, ("int4", "fp16")),
        ({"provider": "dml"}, ("fp16", "fp16")),
        ({"provider": "dml", "branch": "fixed", "expand": True}, ("nf4", "fp16")),
        ({"provider": "dml", "branch": "fixed", "precision": "int8"}, ("int8", "fp16")),
        ({"provider": "dml", "branch": "pooled", "precision": "fp32"}, ("fp32", "fp32")),
        ({"provider": "dml", "precision": "int4", "requantization": Requantization(4, head=None)}, ("int4", "fp16")),
    ],
)
def test_what_it_can_run_is_planned_in_fp16(options: dict[str, Any], expected: tuple[str, str], planned: Plan) -> None:
    plan = planned(**options)
    operators = {node.op_type for node in plan.lowered.graph.model.graph}
    assert (plan.precision, plan.compute_dtype) == expected
    assert not operators & TARGETS[plan.provider].lacks


def test_what_runs_on_the_cpu_instead_is_said(branch_export: BranchFactory) -> None:
    export = branch_export("llama", branch="hot-swap", provider="webgpu")
    assert export.result.warnings == (
        "onnxruntime's webgpu provider has no kernel for FusedMatMul, and runs it on the CPU",
    )
    assert note_operators(frozenset({"MatMulNBits"}), "webgpu") is None


@pytest.mark.parametrize(
    "options", [{"provider": "webgpu", "branch": "hot-swap"}, {"provider": "dml", "branch": "fixed", "expand": True}]
)
def test_parity_is_checked_on_the_cpu(
    options: Mapping[str, Any], checkpoint_dir: CheckpointFactory, adapter_dir: Callable[..., Path], tmp_path: Path
) -> None:
    base = checkpoint_dir("llama", **SHORT["llama"])
    asked = {"merge": False, "quantization": "nf4", **options}
    result = export_onnx(base, {"own": adapter_dir("llama")}, output=tmp_path / "out", **asked)
    assert result.report is not None
    assert result.report.provider == "cpu"
    assert f"onnxruntime has no {options['provider']} provider here: checked on the CPU" in result.report.notes
    assert verify(result.output).notes == result.report.notes
