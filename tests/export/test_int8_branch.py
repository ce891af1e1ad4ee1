"""A branch with A and B in int8: next to the trained function, folded where built in, and nothing stored twice."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from lora_deploy.adapter import apply_adapter, read_adapter
from lora_deploy.adapter.packing import deployed_adapter
from lora_deploy.errors import AdapterError
from lora_deploy.export import export_onnx
from lora_deploy.manifest import Manifest
from lora_deploy.verify.batches import make_batches
from lora_deploy.verify.metrics import compare_logits
from lora_deploy.verify.reference import compute_logits, load_twin
from tests.commands import tree
from tests.conftest import TINY_FAMILIES
from tests.export.conftest import ODD, BranchExport, BranchFactory, cut_branches, distance, run_export, run_twin
from tests.export.test_branch import ODD_ADAPTERS, WHOLE

# int8 costs these narrow models up to 1e-4 of the adapter's own effect in KL, so within 1e-6 it is where that effect is
# some thousandths: at scale 0.02 it is 2e-3 to 9e-3, and int8 costs 1.3e-7 to 5.9e-7.
RANKS = {f"r{r}": {"r": r, "lora_alpha": 2 * r + 3, "seed": r, "scale": 0.02} for r in (3, 8, 16)}
INT8: dict[str, Any] = {"adapter_precision": "int8"}
LIMIT = 1e-6


def _kl(export: BranchExport, found: list[torch.Tensor], reference: list[torch.Tensor]) -> list[float]:
    """Mean KL of each padded batch, nats a token."""
    batches = make_batches(export.base)
    return [
        compare_logits(expected, got, batch.attention_mask, 0.0).mean_kl
        for expected, got, batch in zip(reference, found, batches, strict=True)
    ]


def _deployed_twin(export: BranchExport, name: str) -> list[torch.Tensor]:
    """The twin with A and B as the export rounds them."""
    adapter = deployed_adapter(read_adapter(export.adapters[name]), Manifest.load(export.output).slots)
    twin: Any = apply_adapter(load_twin(export.base), adapter).eval()
    return [
        compute_logits(twin, batch.input_ids, batch.attention_mask) * batch.attention_mask[:, :, None]
        for batch in make_batches(export.base)
    ]


@pytest.mark.parametrize("method", ["nf4", "int8", "none"])
@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_int8_is_the_float_branch_within_a_millionth_and_the_base_alone_is_not(
    family: str, method: str, branch_export: BranchFactory
) -> None:
    floats = branch_export(family, method, "hot-swap", RANKS)
    slots = branch_export(family, method, "hot-swap", RANKS, **INT8)
    bare = run_export(slots, None)
    for name, options in RANKS.items():
        fixed = branch_export(family, method, "fixed", {name: options}, **INT8)
        reference, rounded = run_export(floats, name), _deployed_twin(slots, name)
        assert min(_kl(slots, bare, reference)) > 1000 * LIMIT
        for export, found in ((slots, run_export(slots, name)), (fixed, run_export(fixed))):
            assert max(_kl(export, found, reference)) <= LIMIT
            assert distance(found, rounded) <= 1e-4
        assert distance(rounded, reference) > 1e-4  # it is int8 that was looked at


@pytest.mark.parametrize("branch", ["fixed", "hot-swap"])
@pytest.mark.parametrize(
    ("options", "row"),
    [
        ({}, "fp32"),
        ({"expand": True}, "fp32"),
        ({"precision": "fp32"}, "fp32"),
        ({"precision": "int8"}, "fp32"),
        ({"compute_dtype": "fp16"}, "fp16"),
    ],
    ids=str,
)
def test_it_passes_the_gate_of_its_precision_and_the_base_alone_does_not(
    options: dict[str, Any], row: str, branch: str, branch_export: BranchFactory
) -> None:
    adapters = {"one": {"r": 3}} if branch == "fixed" else {"one": {"r": 3}, "two": {"r": 7, "seed": 2}}
    report = branch_export("llama", "nf4", branch, adapters, verify=True, **INT8, **options).result.report
    assert report is not None
    assert report.passed
    assert report.control_failed
    assert report.precision == row
    assert any("rounded to int8" in note for note in report.notes)
    plain = branch_export("llama", "nf4", branch, adapters, verify=True, **options).result.report
    assert plain is not None
    assert not any("int8" in note for note in plain.notes)


@pytest.mark.parametrize("branch", ["fixed", "hot-swap"])
@pytest.mark.parametrize("kind", ODD_ADAPTERS)
def test_adapters_of_any_layers_and_ranks(kind: str, branch: str, branch_export: BranchFactory) -> None:
    family, options = ODD_ADAPTERS[kind]
    export = branch_export(family, "nf4", branch, {"one": options}, **INT8)
    found, rounded = run_export(export, None if branch == "fixed" else "one"), _deployed_twin(export, "one")
    alone = run_twin(export, None)
    assert distance(found, rounded) <= 1e-4 * max(1.0, distance(rounded, alone))
    assert distance(found, alone) > 0.05


@pytest.mark.parametrize("branch", ["fixed", "hot-swap"])
@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_widths_that_no_block_divides(family: str, branch: str, branch_export: BranchFactory) -> None:
    export = branch_export(family, "nf4", branch, {"one": {"r": 3}}, base=ODD[family], **INT8)
    blocks = {slot.int8_blocks for slot in Manifest.load(export.output).slots}
    assert any(size not in (16, 32) for pair in blocks if pair is not None for size in pair)
    found = run_export(export, None if branch == "fixed" else "one")
    assert distance(found, _deployed_twin(export, "one")) <= 1e-4
    assert distance(found, run_twin(export, None)) > 0.1


@pytest.mark.parametrize("kind", ["biases", "a quantized layer"])
def test_what_was_trained_whole_is_in_a_fixed_branch(kind: str, branch_export: BranchFactory) -> None:
    family, options = WHOLE[kind]
    report = branch_export(family, "nf4", "fixed", {"one": {"r": 3} | options}, verify=True, **INT8).result.report
    assert report is not None
    assert report.passed
    assert report.control_failed


@pytest.mark.parametrize("method", ["none", "nf4", "int8"])
@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_without_an_adapter_the_graph_is_the_bare_base_exactly(
    family: str, method: str, branch_export: BranchFactory, tmp_path: Path
) -> None:
    export = branch_export(family, method, "hot-swap", RANKS, **INT8)
    found, expected = run_export(export, None), run_export(export, None, cut_branches(export, tmp_path))
    assert distance(found, expected) == 0


def _optimized(export: BranchExport, directory: Path) -> Counter[str]:
    """How often each operator is left when onnxruntime has opened the export."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(directory / "optimized.onnx")
    onnxruntime.InferenceSession(str(export.output / "model.onnx"), options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in ir.load(directory / "optimized.onnx").graph)


@pytest.mark.parametrize("compute", ["fp32", "fp16"])
@pytest.mark.parametrize("options", [{}, {"target_modules": ["q_proj", "v_proj"]}], ids=["all", "q and v"])
def test_onnxruntime_folds_a_fixed_branch_to_that_of_floats(
    options: dict[str, Any], compute: str, branch_export: BranchFactory, tmp_path: Path
) -> None:
    asked = {"one": {"r": 3} | options}
    exports = [branch_export("llama", "nf4", "fixed", asked, compute_dtype=compute, **more) for more in ({}, INT8)]
    floats, int8 = (_optimized(export, tmp_path) for export in exports)
    assert int8 == floats
    assert len(list(ir.load(exports[1].output / "model.onnx").graph)) > floats.total()


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {"r": 16}),
        ("qwen2", {"r": 3, "target_modules": ["k_proj", "gate_proj", "down_proj"]}),
        ("gpt2", {"r": 8}),
    ],
    ids=str,
)
def test_a_fixed_slot_stores_each_value_once_and_no_block_of_zeros(
    family: str, options: dict[str, Any], branch_export: BranchFactory
) -> None:
    export = branch_export(family, "nf4", "fixed", {"one": options}, **INT8)
    adapter = read_adapter(export.adapters["one"])
    initializers = ir.load(export.output / "model.onnx").graph.initializers
    for slot in Manifest.load(export.output).slots:
        stored = [initializers[name].const_value.numpy() for name in slot.input_names]  # type: ignore[union-attr]
        updates = [adapter.updates[module] for module in slot.modules if module in adapter.updates]
        assert stored[0].nbytes == sum(update.A.numel() for update in updates)
        assert stored[2].nbytes == sum(update.B.numel() for update in updates)
        assert [array.dtype for array in stored] == [np.int8, np.float32] * 2
        for codes, scales, block in zip(stored[::2], stored[1::2], slot.int8_blocks or (), strict=True):
            assert (scales > 0).all()
            assert scales.size == codes.size / block
    floats = [name for name, value in initializers.items() if "lora" in name and value.dtype == ir.DataType.FLOAT]
    assert all(name.endswith("scales") for name in floats)


@pytest.mark.parametrize("branch", ["fixed", "hot-swap"])
@pytest.mark.parametrize("compute", ["fp32", "fp16"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_branch_has_the_form_that_fusions_look_for_and_standard_operators(
    family: str, compute: str, branch: str, branch_export: BranchFactory
) -> None:
    """Add(base, MatMul(MatMul(x, A), B)), and no operator by which onnxruntime would round activations."""
    export = branch_export(family, "nf4", branch, {"one": {"r": 3}}, compute_dtype=compute, **INT8)
    onnx.checker.check_model(str(export.output / "model.onnx"), full_check=True)
    graph = ir.load(export.output / "model.onnx").graph
    values = {output.name: output for node in graph for output in node.outputs}
    for slot in Manifest.load(export.output).slots:
        name_a, name_b = slot.matrix_names
        (down,), (up,) = values[name_a].consumers(), values[name_b].consumers()
        assert (down.op_type, down.inputs[1], up.op_type, up.inputs[1]) == (
            "MatMul",
            values[name_a],
            "MatMul",
            values[name_b],
        )
        assert up.inputs[0] is down.outputs[0]
        (add,) = up.outputs[0].consumers()
        assert (add.op_type, add.inputs[1]) == ("Add", up.outputs[0])
        assert add.inputs[0].producer().inputs[0] is down.inputs[0]  # type: ignore[union-attr]
    own = {node.op_type for node in graph if ".lora_" in str(node.name) and node.domain == ""}
    assert own <= {"Add", "Cast", "Concat", "MatMul", "Mul", "Pad", "Reshape", "Split"}
    assert "DequantizeLinear" not in {node.op_type for node in graph}


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_a_slot_is_four_optional_inputs_of_rank_zero(family: str, branch_export: BranchFactory) -> None:
    export = branch_export(family, "nf4", "hot-swap", {"one": {}}, **INT8)
    model = onnx.load(export.output / "model.onnx", load_external_data=False)
    inputs = {value.name: value.type.tensor_type for value in model.graph.input}
    initializers = {tensor.name: tensor for tensor in model.graph.initializer}
    float32, int8 = onnx.TensorProto.FLOAT, onnx.TensorProto.INT8
    for slot in Manifest.load(export.output).slots:
        a, b = slot.int8_blocks or (0, 0)
        rank = f"{slot.name}.rank"
        shapes = [[size.dim_value or size.dim_param for size in inputs[name].shape.dim] for name in slot.input_names]
        assert shapes == [
            [slot.inputs // a, a, rank],
            [slot.inputs // a, 1, rank],
            [rank, slot.outputs // b, b],
            [rank, slot.outputs // b, 1],
        ]
        assert [inputs[name].elem_type for name in slot.input_names] == [int8, float32, int8, float32]
        for name, shape in zip(slot.input_names, shapes, strict=True):
            assert list(initializers[name].dims) == [0 if size == rank else size for size in shape]
            assert "." not in name


@pytest.mark.parametrize("branch", ["fixed", "hot-swap"])
def test_the_same_input_gives_the_same_bytes_in_every_file(
    branch: Any, branch_export: BranchFactory, tmp_path: Path
) -> None:
    first = branch_export("llama", "nf4", branch, {"one": {"r": 3}}, **INT8)
    options: dict[str, Any] = {"merge": False, "branch": branch, "quantization": "nf4", "verify": False}
    again = export_onnx(first.base_dir, first.adapters, output=tmp_path / "out", **options, **INT8)
    assert tree(again.output) == tree(first.output)


def test_the_fingerprint_says_how_a_and_b_are_stored(branch_export: BranchFactory) -> None:
    floats, int8 = (Manifest.load(branch_export("llama", "nf4", **more).output) for more in ({}, INT8))
    assert floats.fingerprint != int8.fingerprint
    assert "int8_blocks" not in floats.entries()["lora_deploy.slots"]  # files made before are still taken
    assert [slot.model_copy(update={"int8_blocks": None}) for slot in int8.slots] == list(floats.slots)


@pytest.mark.parametrize("branch", ["fixed", "hot-swap"])
def test_a_value_that_the_computation_cannot_hold_is_refused(branch: str, branch_export: BranchFactory) -> None:
    with pytest.raises(AdapterError, match="too large") as caught:
        branch_export("llama", "nf4", branch, {"one": {"scale": 3e4}}, compute_dtype="fp16", **INT8)
    assert "--compute-dtype fp32" in caught.value.details["remedy"]
