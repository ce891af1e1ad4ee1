"""DoRA's magnitudes and the biases of B, merged and built in: the function that was trained, not the one without."""

from __future__ import annotations

from typing import Any

import pytest

from lora_deploy.adapter import read_adapter
from lora_deploy.errors import AdapterError
from tests.conftest import TINY_FAMILIES
from tests.export.conftest import ODD, BranchExport, BranchFactory, distance, run_export, run_twin

DORA: dict[str, Any] = {"use_dora": True, "r": 5, "lora_alpha": 3}
BIAS: dict[str, Any] = {"lora_bias": True, "r": 5, "lora_alpha": 3}
SETTINGS = pytest.mark.parametrize("setting", [DORA, BIAS], ids=["dora", "bias of B"])
MODES: dict[str, dict[str, Any]] = {
    "merged": {"branch": None},
    "fixed": {"branch": "fixed"},
    "fixed in int8": {"branch": "fixed", "adapter_precision": "int8"},
}


def _without(setting: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in setting.items() if name not in ("use_dora", "lora_bias")}


def _assert_exact(export: BranchExport, tolerance: float = 1e-3) -> None:
    report = export.result.report
    assert report is not None
    assert report.passed
    assert report.control_failed
    for case in report.cases:
        assert case.export.max_abs <= tolerance
        assert case.control is None or case.control.max_abs > 10 * tolerance


@SETTINGS
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("method", ["none", "nf4", "int8"])
@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_every_family_passes_the_gate(
    family: str, method: str, mode: str, setting: dict[str, Any], branch_export: BranchFactory
) -> None:
    options = MODES[mode] | {"adapters": {"own": setting}, "verify": True}
    _assert_exact(branch_export(family, method, **options))


@SETTINGS
@pytest.mark.parametrize("mode", ["merged", "fixed"])
@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_without_them_it_would_be_another_function(
    family: str, mode: str, setting: dict[str, Any], branch_export: BranchFactory
) -> None:
    export = branch_export(family, "nf4", adapters={"own": setting}, **MODES[mode])
    plain = branch_export(family, "nf4", adapters={"own": _without(setting)}, **MODES[mode])
    own, left_out = (read_adapter(one.adapters["own"]) for one in (export, plain))
    assert own.updates.keys() == left_out.updates.keys()
    found = run_export(export)
    assert distance(found, run_twin(export, "own")) <= 1e-4
    assert distance(found, run_twin(plain, "own")) > 0.1


PARTS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("llama", {}, {"target_modules": ["q_proj", "v_proj", "down_proj"]}),
    ("llama", {}, {"target_modules": ["lm_head", "q_proj"]}),
    ("gpt2", {}, {"target_modules": ["lm_head", "c_attn"]}),
    ("gpt2", {}, {"target_modules": ["c_fc"], "modules_to_save": ["ln_f"], "bias": "all"}),
    ("qwen2", {}, {"bias": "lora_only", "layers_to_transform": [1]}),
    ("llama", {"base": ODD["llama"]}, {}),
    ("gpt2", {"base": ODD["gpt2"]}, {}),
]


@SETTINGS
@pytest.mark.parametrize(
    ("family", "options", "adapter"),
    [
        (family, {"branch": branch, **options}, adapter)
        for branch in (None, "fixed")
        for family, options, adapter in PARTS
    ]
    + [("llama", {"branch": "fixed", "expand": True}, {}), ("llama", {"branch": "fixed", "precision": "int8"}, {})],
    ids=str,
)
def test_parts_of_a_model_and_odd_shapes(
    family: str, options: dict[str, Any], adapter: dict[str, Any], setting: dict[str, Any], branch_export: BranchFactory
) -> None:
    _assert_exact(branch_export(family, "nf4", adapters={"own": setting | adapter}, verify=True, **options))


@SETTINGS
@pytest.mark.parametrize(
    "options",
    [
        {"precision": "int8", "accuracy_level": 0},
        {"precision": "int4"},
        {"precision": "int8", "branch": "fixed"},
        {"precision": "fp16"},
        {"branch": "fixed", "compute_dtype": "fp16"},
    ],
    ids=str,
)
@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_every_precision_passes_its_own_gate(
    family: str, options: dict[str, Any], setting: dict[str, Any], branch_export: BranchFactory
) -> None:
    asked = {"branch": None, **options}
    report = branch_export(family, "nf4", adapters={"own": setting}, verify=True, **asked).result.report
    assert report is not None
    assert report.passed
    assert report.control_failed
    if report.deployment is not None and options["precision"] == "int8":
        assert report.deployment.survives == pytest.approx(1, abs=0.05)


@SETTINGS
@pytest.mark.parametrize("branch", ["hot-swap", "pooled"])
def test_graphs_with_slots_refuse_them_by_name(
    branch: str, setting: dict[str, Any], branch_export: BranchFactory
) -> None:
    with pytest.raises(AdapterError, match="no place for") as caught:
        branch_export("llama", "nf4", branch, {"own": setting})
    assert caught.value.details["tensor"] in ("use_dora", "lora_bias")
    assert "--branch --fixed or --merge" in caught.value.details["remedy"]
