"""The adapter beside the base: the function that was trained, for every kind of branch, base, family and precision."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from safetensors.torch import load_file

from lora_deploy.adapter import read_adapter
from lora_deploy.errors import AdapterError
from lora_deploy.export.merge import hash_adapter
from lora_deploy.manifest import Manifest
from lora_deploy.verify import ParityReport
from lora_deploy.verify.tolerances import TOLERANCES
from tests.conftest import QUANTIZED, TINY_FAMILIES
from tests.export.conftest import ODD, BranchFactory, distance, run_export, run_twin

KINDS = ("fixed", "hot-swap", "pooled")
TWO: dict[str, dict[str, Any]] = {"one": {"r": 4}, "two": {"r": 7, "lora_alpha": 3, "seed": 2}}


def _adapters(branch: str) -> dict[str, dict[str, Any]]:
    return {"one": TWO["one"]} if branch == "fixed" else TWO


def _assert_proves(report: ParityReport | None) -> None:
    """Every case holds, and without the adapter it would not, by far."""
    assert report is not None
    assert report.passed
    assert report.control_failed
    tolerance = TOLERANCES[report.precision]
    controls = [case.control for case in report.cases if case.control is not None]
    assert controls
    for control in controls:
        assert control.mean_kl > 10 * tolerance.kl
        assert tolerance.max_abs is None or control.max_abs > 10 * tolerance.max_abs


@pytest.mark.parametrize("branch", KINDS)
@pytest.mark.parametrize("method", ["none", *QUANTIZED])
@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_a_branch_passes_the_gate_and_the_base_alone_does_not(
    family: str, method: str, branch: str, branch_export: BranchFactory
) -> None:
    export = branch_export(family, method, branch, _adapters(branch), verify=True)
    report = export.result.report
    _assert_proves(report)
    assert report is not None
    labels = {case.adapter for case in report.cases}
    expected = {"fixed": {""}, "hot-swap": {"no adapter", "one", "two"}}
    assert labels == expected.get(branch, {"no adapter", "one", "two", "mixed 1"})
    assert (report.codes is not None) == (method != "none")
    assert report.codes is None or (report.codes.exact and report.codes.layers == (8 if family == "gpt2" else 14))


@pytest.mark.parametrize("branch", KINDS)
@pytest.mark.parametrize(
    ("options", "row"),
    [
        ({"expand": True}, "fp32"),
        ({"precision": "fp32"}, "fp32"),
        ({"precision": "fp16"}, "fp16"),
        ({"compute_dtype": "fp16"}, "fp16"),
        ({"precision": "int8"}, "fp32"),
    ],
    ids=["expanded", "fp32", "fp16", "computed in fp16", "int8"],
)
def test_every_precision_of_an_nf4_base_passes_its_own_gate(
    options: dict[str, Any], row: str, branch: str, branch_export: BranchFactory
) -> None:
    report = branch_export("llama", "nf4", branch, _adapters(branch), verify=True, **options).result.report
    _assert_proves(report)
    assert report is not None
    assert report.precision == row


@pytest.mark.parametrize("family", TINY_FAMILIES)
@pytest.mark.parametrize("method", ["nf4", "int8"])
def test_a_branch_computes_what_the_merged_export_computes(
    method: str, family: str, branch_export: BranchFactory
) -> None:
    """Prefill and decoding from the cache, in batches of four padded on either side and a single row."""
    merged = run_export(branch_export(family, method, None, {"one": TWO["one"]}))
    for branch in KINDS:
        export = branch_export(family, method, branch, _adapters(branch))
        found = run_export(export, None if branch == "fixed" else "one")
        assert distance(found, merged) <= 1e-4
        if branch != "fixed":
            assert distance(run_export(export, "two"), merged) > 0.1
            assert distance(run_export(export, None), merged) > 0.1


ODD_ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "only q and v": ("llama", {"target_modules": ["q_proj", "v_proj"]}),
    "only down": ("llama", {"target_modules": ["down_proj"]}),
    "only k of the second layer": ("qwen2", {"target_modules": ["k_proj"], "layers_to_transform": [1], "scale": 1.0}),
    "a rank for each": (
        "llama",
        {"rank_pattern": {"q_proj": 7, "down_proj": 2}, "alpha_pattern": {"v_proj": 3, "up_proj": 21}},
    ),
    "rank-stabilized": ("qwen2", {"r": 9, "lora_alpha": 2, "use_rslora": True}),
    "rank 1": ("llama", {"r": 1, "lora_alpha": 3}),
    "a rank above both widths": ("llama", {"r": 120, "lora_alpha": 60, "scale": 0.1}),
    "GPT-2's MLP": ("gpt2", {"target_modules": ["c_fc"]}),
    "GPT-2's attention": ("gpt2", {"target_modules": ["c_attn"], "r": 5}),
    "the head": ("llama", {"target_modules": ["lm_head", "q_proj"]}),
    "the tied head": ("gpt2", {"target_modules": ["lm_head", "c_attn"]}),
    "the tied head alone": ("gpt2", {"target_modules": ["lm_head"]}),
}


@pytest.mark.parametrize("branch", ["fixed", "hot-swap"])
@pytest.mark.parametrize("kind", ODD_ADAPTERS)
def test_adapters_of_any_layers_and_ranks_compute_what_they_did_in_training(
    kind: str, branch: str, branch_export: BranchFactory
) -> None:
    family, options = ODD_ADAPTERS[kind]
    export = branch_export(family, "nf4", branch, {"one": options})
    found = run_export(export, None if branch == "fixed" else "one")
    expected, alone = run_twin(export, "one"), run_twin(export, None)
    assert distance(found, expected) <= 1e-4 * max(1.0, distance(expected, alone))
    assert distance(found, alone) > 0.05
    if branch != "hot-swap":  # what is not adapted has no branch
        modules = {module for slot in Manifest.load(export.output).slots for module in slot.modules}
        targets = options.get("target_modules")
        if targets == ["down_proj"]:
            assert {module.rpartition(".")[2] for module in modules} == {"down_proj"}


@pytest.mark.parametrize(("branch", "method"), [("fixed", "fp4"), ("hot-swap", "nf4"), ("pooled", "int8")])
@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_blocks_that_cross_rows_and_odd_widths_are_no_exception(
    family: str, branch: str, method: str, branch_export: BranchFactory
) -> None:
    export = branch_export(family, method, branch, _adapters(branch), base=ODD[family])
    found = run_export(export, None if branch == "fixed" else "one")
    assert distance(found, run_twin(export, "one")) <= 1e-4
    assert distance(found, run_twin(export, None)) > 0.1


@pytest.mark.parametrize("branch", KINDS)
def test_a_tied_head_with_a_branch_leaves_the_embedding_shared_and_the_bases(
    branch: str, branch_export: BranchFactory
) -> None:
    export = branch_export("gpt2", "nf4", branch, {"one": {"target_modules": ["lm_head", "c_attn"]}})
    initializers = ir.load(export.output / "model.onnx").graph.initializers
    dense = [name for name in initializers if ("wte" in name or "lm_head" in name) and "lora" not in name]
    assert len(dense) == 1
    value = initializers[dense[0]].const_value
    assert value is not None
    (saved,) = (v for k, v in load_file(export.base_dir / "model.safetensors").items() if k.endswith("wte.weight"))
    assert np.array_equal(value.numpy(), saved.numpy())
    (head,) = (slot for slot in Manifest.load(export.output).slots if "lm_head" in slot.modules)
    assert head.name == "lm_head"


WHOLE: dict[str, tuple[str, dict[str, Any]]] = {
    "llama's head": ("llama", {"modules_to_save": ["lm_head"]}),
    "a tied head and biases": ("gpt2", {"modules_to_save": ["lm_head"], "bias": "all"}),
    "biases": ("qwen2", {"bias": "all"}),
    "a quantized layer": ("llama", {"modules_to_save": ["q_proj"], "target_modules": ["v_proj", "down_proj"]}),
    "a quantized layer of a Conv1D": ("gpt2", {"modules_to_save": ["c_fc"], "target_modules": ["c_attn"]}),
}


@pytest.mark.parametrize(
    ("kind", "method"), [*((kind, "nf4") for kind in WHOLE), ("biases", "int8"), ("a tied head and biases", "int8")]
)
def test_what_was_trained_whole_is_in_a_fixed_branch(kind: str, method: str, branch_export: BranchFactory) -> None:
    family, options = WHOLE[kind]
    export = branch_export(family, method, "fixed", {"one": {"r": 3, "lora_alpha": 7} | options}, verify=True)
    _assert_proves(export.result.report)
    coded = {module.name for weight in Manifest.load(export.output).coded for module in weight.modules}
    saved = options.get("modules_to_save", ["lm_head"])[0]
    assert coded == {name for name in export.base.linears if not name.endswith(saved)}


@pytest.mark.parametrize("branch", ["hot-swap", "pooled"])
@pytest.mark.parametrize("kind", WHOLE)
def test_what_was_trained_whole_is_refused_by_name_where_the_base_serves_all(
    kind: str, branch: str, branch_export: BranchFactory
) -> None:
    family, options = WHOLE[kind]
    with pytest.raises(AdapterError, match="trains parameters of the base whole") as caught:
        branch_export(family, "nf4", branch, {"one": {"r": 3, "lora_alpha": 7} | options})
    named = caught.value.details["tensor"]
    assert named.endswith(("bias", f"{options.get('modules_to_save', ['?'])[0]}.weight"))
    assert "--fixed" in caught.value.details["remedy"]


def test_the_scaling_is_in_b_and_b_is_in_the_order_of_the_outputs(branch_export: BranchFactory) -> None:
    """Against the saved tensors themselves: A side by side, B in blocks, times alpha / r."""
    export = branch_export("llama", "nf4", "fixed", {"one": TWO["one"]})
    saved = load_file(export.adapters["one"] / "adapter_model.safetensors")
    initializers = ir.load(export.output / "model.onnx").graph.initializers
    site = "base_model.model.model.layers.0.self_attn."
    halves = [
        [saved[f"{site}{name}_proj.lora_{side}.weight"].float() for name in ("q", "k", "v")] for side in ("A", "B")
    ]
    a, b = (
        torch.tensor(initializers[f"model/layers/0/self_attn/q_proj+k_proj+v_proj/lora_{side}"].const_value.numpy())  # type: ignore[union-attr]
        for side in ("A", "B")
    )
    assert torch.equal(a, torch.cat(halves[0]).t())
    assert torch.equal(b, torch.block_diag(*halves[1]).t() * (10 / 4))


def test_the_adapters_are_described_in_the_metadata(branch_export: BranchFactory) -> None:
    export = branch_export("llama", "nf4", "pooled", TWO)
    entries = ir.load(export.output / "model.onnx").metadata_props
    described = json.loads(entries["lora_deploy.adapters"])
    hashes = {name: hash_adapter(read_adapter(place)) for name, place in export.adapters.items()}
    assert {name: one["sha256"] for name, one in described.items()} == hashes
    assert {name: one["config"]["r"] for name, one in described.items()} == {"one": 4, "two": 7}
    assert Manifest.load(export.output).pool == ("one", "two")
