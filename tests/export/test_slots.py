"""The places of adapters in a graph: optional and without effect when empty, one product for a site, mixed by row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from lora_deploy.export import export_onnx
from lora_deploy.manifest import Manifest
from lora_deploy.run import OnnxSession
from lora_deploy.run.adapters import Adapters
from lora_deploy.slots import Slot, SlotPart
from lora_deploy.verify.batches import make_batches
from tests.commands import tree
from tests.conftest import TINY_FAMILIES, VOCABULARY
from tests.export.conftest import (
    BranchFactory,
    cut_branches,
    distance,
    run_batch,
    run_export,
    run_twin,
)

FIVE = {f"r{r}": {"r": r, "lora_alpha": 24, "seed": r, "scale": 0.15} for r in (4, 8, 16, 32, 64)}
EIGHT = {f"r{r}": {"r": r, "lora_alpha": 3 + r, "seed": r, "scale": 0.15} for r in (1, 2, 3, 4, 5, 8, 16, 40)}
BASES: list[tuple[str, dict[str, Any]]] = [
    ("none", {}),
    ("nf4", {}),
    ("nf4", {"expand": True}),
    ("nf4", {"precision": "int8"}),
    ("nf4", {"precision": "fp16"}),
    ("int8", {}),
]


@pytest.mark.parametrize(("method", "options"), BASES, ids=str)
@pytest.mark.parametrize(
    ("family", "branch"), [*((family, "hot-swap") for family in TINY_FAMILIES), ("llama", "pooled")]
)
def test_without_an_adapter_the_graph_is_the_bare_base_exactly(
    family: str, branch: str, method: str, options: dict[str, Any], branch_export: BranchFactory, tmp_path: Path
) -> None:
    """Against the same graph with every branch cut out.

    One exception: where standard operators multiply, onnxruntime adds GPT-2's biases in another order if no branch
    stands between product and bias (fused into SkipLayerNormalization), which rounds differently.
    """
    adapters = {"one": {}} if branch == "pooled" else {}
    export = branch_export(family, method, branch, adapters, **options)
    bare = cut_branches(export, tmp_path)
    nodes = [node.name for node in ir.load(bare).graph]
    assert not [name for name in nodes if "lora" in str(name)]
    assert [value.name for value in ir.load(bare).graph.inputs if "lora" in str(value.name)] == []
    found, expected = run_export(export, None), run_export(export, None, bare)
    apart = distance(found, expected)
    assert apart < 1e-5 if family == "gpt2" and "expand" in options else apart == 0
    assert distance(found, run_twin(export, None)) < (0.5 if {"precision"} & set(options) else 1e-4)


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_without_an_adapter_it_is_the_base_as_it_is_exported_alone(
    family: str, branch_export: BranchFactory, tmp_path: Path
) -> None:
    export = branch_export(family, "nf4", "hot-swap", {}, precision="fp32")
    alone = export_onnx(export.base_dir, output=tmp_path / "alone", quantization="nf4", verify=False)
    found, expected = run_export(export, None), run_export(export, None, alone.output)
    assert all(np.array_equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_five_adapters_in_turn_on_one_session_are_each_their_own_twin(
    family: str, branch_export: BranchFactory
) -> None:
    """Twice round, so that none leaves anything to the next; rank 64 is above the width of a layer."""
    export = branch_export(family, "nf4", "hot-swap", FIVE)
    session, batches = OnnxSession(export.output), make_batches(export.base)
    adapters = Adapters(session, export.output)
    assert adapters.names == sorted(FIVE)
    runs: dict[str, list[torch.Tensor]] = {}
    for name in [*FIVE, *reversed(FIVE)]:
        found = [run_batch(session, batch, adapters.inputs(name)) for batch in batches]
        if name in runs:
            assert distance(found, runs[name]) == 0
        runs[name] = found
    twins = {name: run_twin(export, name) for name in FIVE}
    for name in FIVE:
        for other in FIVE:
            apart = distance(runs[name], twins[other])
            assert apart < 1e-4 if name == other else apart > 0.1
    bare = [run_batch(session, batch) for batch in batches]
    assert distance(bare, run_twin(export, None)) < 1e-4


def _rows(count: int = 8, length: int = 11) -> np.ndarray:
    return np.random.default_rng(5).integers(3, VOCABULARY, (count, length))


@pytest.mark.parametrize("method", ["none", "nf4", "int8"])
@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_eight_rows_with_eight_adapters_are_eight_separate_runs(
    family: str, method: str, branch_export: BranchFactory
) -> None:
    """The separate runs are those of a hot-swap export; prefill, then one more token from the cache."""
    pooled, single = (branch_export(family, method, kind, EIGHT) for kind in ("pooled", "hot-swap"))
    session, alone = OnnxSession(pooled.output), OnnxSession(single.output)
    chosen, one_by_one = Adapters(session, pooled.output), Adapters(alone, single.output)
    ids = _rows()
    mask, next_ids = np.ones_like(ids), ids[:, :1]
    more = np.ones((8, ids.shape[1] + 1), np.int64)
    inputs = chosen.row_inputs(list(EIGHT))
    found, cache = session.forward(ids, mask, None, inputs)
    then, _ = session.forward(next_ids, more, cache, inputs)
    base, _ = alone.forward(ids, mask)
    for row, name in enumerate(EIGHT):
        given = one_by_one.inputs(name)
        expected, cache = alone.forward(ids[row : row + 1], mask[row : row + 1], None, given)
        expected_then, _ = alone.forward(next_ids[row : row + 1], more[row : row + 1], cache, given)
        assert np.abs(found[row] - expected[0]).max() <= 1e-4
        assert np.abs(then[row] - expected_then[0]).max() <= 1e-4
        assert np.abs(found[row] - base[row]).max() > 0.01


def test_a_row_without_an_adapter_is_the_bare_base_beside_rows_that_have_one(
    branch_export: BranchFactory, tmp_path: Path
) -> None:
    export = branch_export("llama", "nf4", "pooled", EIGHT)
    session, bare = OnnxSession(export.output), OnnxSession(cut_branches(export, tmp_path))
    adapters, ids = Adapters(session, export.output), _rows()
    choices = [None if row % 2 else name for row, name in enumerate(EIGHT)]
    found, _ = session.forward(ids, np.ones_like(ids), None, adapters.row_inputs(choices))
    expected, _ = bare.forward(ids, np.ones_like(ids))
    assert np.array_equal(found[1::2], expected[1::2])
    assert np.abs(found[::2] - expected[::2]).max(axis=(1, 2)).min() > 0.01
    nothing, _ = session.forward(ids, np.ones_like(ids), None, adapters.row_inputs([None] * 8))
    assert np.array_equal(nothing, expected)
    default, _ = session.forward(ids, np.ones_like(ids))
    assert np.array_equal(default, expected)
    # One id serves every row.
    name = list(EIGHT)[3]
    one, _ = session.forward(ids, np.ones_like(ids), None, adapters.row_inputs([name]))
    each, _ = session.forward(ids, np.ones_like(ids), None, adapters.row_inputs([name] * 8))
    assert np.array_equal(one, each)


@pytest.mark.parametrize("branch", ["fixed", "hot-swap", "pooled"])
@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_a_site_has_one_branch_of_the_form_that_fusions_look_for(
    family: str, branch: str, branch_export: BranchFactory
) -> None:
    """Add(base, MatMul(MatMul(x, A), B)); q, k and v, and gate and up, share one product with A."""
    export = branch_export(family, "nf4", branch, {"one": {}})
    graph = ir.load(export.output / "model.onnx").graph
    slots = Manifest.load(export.output).slots
    assert len(slots) == 2 * 4
    products = {weight.output for weight in Manifest.load(export.output).coded}
    for slot in slots:
        name_a, name_b = slot.input_names
        (down,) = graph.initializers[name_a].consumers()
        (up,) = graph.initializers[name_b].consumers()
        assert (down.op_type, down.inputs[1]) == ("MatMul", graph.initializers[name_a])
        assert (up.op_type, up.inputs[1]) == ("MatMul", graph.initializers[name_b])
        between = up.inputs[0].producer()  # type: ignore[union-attr]
        if branch == "pooled":  # what is the row's own adapter's
            assert between is not None
            assert between.op_type == "Where"
            between = between.inputs[1].producer()  # type: ignore[union-attr]
        assert between is down
        (add,) = up.outputs[0].consumers()
        assert (add.op_type, add.inputs[1]) == ("Add", up.outputs[0])
        base = add.inputs[0]
        assert base is not None
        assert base.name in products
        assert base.producer().inputs[0] is down.inputs[0]  # type: ignore[union-attr]
    counts = [node.op_type for node in graph]
    assert counts.count("MatMul") == 2 * len(slots)
    assert counts.count("MatMulBnb4") == len(slots)


@pytest.mark.parametrize("options", [{}, {"precision": "fp16"}], ids=["nf4", "fp16"])
@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_a_slot_is_an_optional_input_of_rank_zero(
    family: str, options: dict[str, Any], branch_export: BranchFactory
) -> None:
    export = branch_export(family, "nf4", "hot-swap", {"one": {}}, **options)
    model = onnx.load(export.output / "model.onnx", load_external_data=False)
    onnx.checker.check_model(str(export.output / "model.onnx"), full_check=True)
    inputs = {value.name: value.type.tensor_type for value in model.graph.input}
    initializers = {tensor.name: tensor for tensor in model.graph.initializer}
    for slot in Manifest.load(export.output).slots:
        name_a, name_b = slot.input_names
        assert list(initializers[name_a].dims) == [slot.inputs, 0]
        assert list(initializers[name_b].dims) == [0, slot.outputs]
        sizes = [[size.dim_value or size.dim_param for size in inputs[name].shape.dim] for name in slot.input_names]
        assert sizes == [[slot.inputs, f"{slot.name}.rank"], [f"{slot.name}.rank", slot.outputs]]
        assert {inputs[name].elem_type for name in slot.input_names} == {initializers[name_a].data_type}
        for name in slot.input_names:
            assert ".key" not in name
            assert ".value" not in name
    others = [name for name in inputs if "lora" not in name]
    assert set(others) & set(initializers) == set()


@pytest.mark.parametrize("name", ["decoder.key", "h.0.attn.key+value", "value.key.value", "model.keys.0.values"])
def test_an_inputs_name_is_never_one_of_a_cache(name: str) -> None:
    """Clients take every input with ".key" or ".value" in its name for a cache."""
    slot = Slot(name=name, inputs=3, outputs=5, parts=(SlotPart(module=name, rows=(0, 5)),))
    assert len(set(slot.input_names)) == 2
    for found in slot.input_names:
        assert "." not in found


@pytest.mark.parametrize("branch", ["fixed", "hot-swap", "pooled"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_same_input_gives_the_same_bytes_in_every_file(
    family: str, branch: Any, branch_export: BranchFactory, tmp_path: Path
) -> None:
    adapters = {"one": {"r": 3}} if branch == "fixed" else {"one": {"r": 3}, "two": {"r": 5, "seed": 2}}
    first = branch_export(family, "nf4", branch, adapters)
    again = export_onnx(
        first.base_dir,
        first.adapters,
        output=tmp_path / "another" / "name",
        merge=False,
        branch=branch,
        quantization="nf4",
        verify=False,
    )
    assert tree(again.output) == tree(first.output)
    names = {file.name for file in first.output.rglob("*.onnx_adapter")}
    assert names == ({"one.onnx_adapter", "two.onnx_adapter"} if branch == "hot-swap" else set())


def test_the_slots_of_an_export_do_not_depend_on_the_adapters_it_was_made_with(branch_export: BranchFactory) -> None:
    """So that an adapter of other layers fits later."""
    some = branch_export("llama", "nf4", "hot-swap", {"one": {"target_modules": ["q_proj"]}})
    none = branch_export("llama", "nf4", "hot-swap", {})
    assert Manifest.load(some.output).slots == Manifest.load(none.output).slots
    assert Manifest.load(some.output).fingerprint == Manifest.load(none.output).fingerprint
    head = branch_export("llama", "nf4", "hot-swap", {"one": {"target_modules": ["lm_head", "q_proj"]}})
    assert len(Manifest.load(head.output).slots) == len(Manifest.load(none.output).slots) + 1
    assert Manifest.load(head.output).fingerprint != Manifest.load(none.output).fingerprint
