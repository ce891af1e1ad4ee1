"""What a report says beside its figures: weak adapters by name, and adapters that an overwrite takes away."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from lora_deploy.errors import UsageError
from lora_deploy.export import export_onnx
from lora_deploy.verify.cases import weak_effects
from lora_deploy.verify.report import CaseResult, Metrics, ParityReport
from lora_deploy.verify.tolerances import TOLERANCES
from tests.export.conftest import BranchFactory


def _case(adapter: str, control: float) -> CaseResult:
    """A case whose control is off by so many times the tolerance of fp32."""
    kl, max_abs = (control * (limit or 0) for limit in (TOLERANCES["fp32"].kl, TOLERANCES["fp32"].max_abs))
    same = Metrics(max_abs=0, mean_kl=0, max_kl=0, top1=1, tokens=9, ties=0)
    other = same.model_copy(update={"max_abs": max_abs, "mean_kl": kl})
    return CaseResult(
        adapter=adapter, name="prefill", export=same, control=other, passed=True, control_passed=control <= 1
    )


def test_an_adapter_whose_effect_is_less_than_ten_tolerances_is_named() -> None:
    cases = [_case("strong", 1e6), _case("weak", 300), _case("weak", 5), _case("nothing", 0.5)]
    (note,) = weak_effects(cases, TOLERANCES["fp32"])
    assert "the effect of weak is only 5.0 times" in note


def test_only_the_adapter_that_changes_nothing_is_blamed() -> None:
    report = ParityReport(
        precision="fp32",
        provider="cpu",
        tolerance={"kl": 1e-6},
        cases=[_case("strong", 1e6), _case("nothing", 0.5)],
        control_failed=False,
        passed=False,
    )
    assert "nothing: prefill" in report.failures()
    assert "strong" not in report.failures()


def test_an_overwrite_says_which_adapters_are_gone(branch_export: BranchFactory, tmp_path: Path) -> None:
    made = branch_export(adapters={"one": {}, "two": {"seed": 3}})
    directory = Path(shutil.copytree(made.output, tmp_path / "out"))
    options = {"merge": False, "quantization": "nf4", "verify": False, "overwrite": True}
    result = export_onnx(made.base_dir, {"one": made.adapters["one"]}, output=directory, **options)  # type: ignore[arg-type]
    assert any("two" in warning and "one" not in warning.split(":")[1] for warning in result.warnings)
    assert [file.name for file in (directory / "adapters").iterdir()] == ["one.onnx_adapter"]


def test_merging_and_a_kind_of_branch_contradict_each_other(branch_export: BranchFactory, tmp_path: Path) -> None:
    made = branch_export()
    with pytest.raises(UsageError, match="merged, or it is a branch"):
        export_onnx(made.base_dir, made.adapters["own"], output=tmp_path / "out", branch="fixed")
