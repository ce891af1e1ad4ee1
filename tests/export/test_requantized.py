"""Merged weights that become codes again: what is in the graph, and what it computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from lora_deploy.adapter import read_adapter
from lora_deploy.errors import UsageError
from lora_deploy.export import export_onnx
from lora_deploy.export.coded import decode
from lora_deploy.export.merge import MergedParameters
from lora_deploy.manifest import CodedWeight, Manifest
from lora_deploy.requantize import Requantization
from lora_deploy.requantize.rounding import round_plain
from lora_deploy.run import OnnxSession
from lora_deploy.verify.batches import make_batches
from lora_deploy.verify.reference import compute_logits, load_twin
from tests.export.conftest import ODD, SHORT, BranchExport, BranchFactory, distance, run_batch, run_export, run_twin

FAMILIES = ("llama", "qwen2", "gpt2")


def _plain(bits: int = 4, **options: Any) -> dict[str, Any]:
    options = {"rows": 0, "head": None} | options
    return {"branch": None, "precision": f"int{bits}", "requantization": Requantization(bits, **options)}  # type: ignore[arg-type]


def _graph(export: BranchExport) -> tuple[ir.Model, Manifest]:
    model = ir.load(export.output / "model.onnx")
    return model, Manifest.read(model.metadata_props, "")


def _nodes(model: ir.Model, op_type: str) -> list[ir.Node]:
    return [node for node in model.graph if node.op_type == op_type]


def _values(model: ir.Model, weight: CodedWeight) -> dict[str, torch.Tensor]:
    """What the initializers of one product stand for, layer by layer."""
    codes, scales = (
        torch.from_numpy(model.graph.initializers[name].const_value.numpy().copy()).reshape(weight.shape[0], -1)  # type: ignore[union-attr]
        for name in (weight.codes, weight.scales)
    )
    found, row = {}, 0
    for module in weight.modules:
        rows = slice(row, row + module.shape[0])
        found[module.name] = decode(codes[rows].reshape(-1), scales[rows].reshape(-1), weight, module.shape)
        row += module.shape[0]
    return found


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("odd", [False, True])
def test_the_graph_holds_the_rounded_merged_weights(
    branch_export: BranchFactory, family: str, bits: int, odd: bool
) -> None:
    export = branch_export(family, base=(ODD if odd else SHORT)[family], **_plain(bits, blocksize=16))
    model, manifest = _graph(export)
    parameters = MergedParameters(export.base, read_adapter(export.adapters["own"]))
    seen = set()
    for weight in manifest.coded:
        assert (weight.operator, weight.scheme, weight.blocksize) == ("MatMulNBits", f"int{bits}", 16)
        for name, values in _values(model, weight).items():
            merged = parameters.read(f"{name}.weight", transposed=export.base.linears[name].is_conv1d)
            assert torch.equal(values, round_plain(merged, bits, 16).dequantize())
            seen.add(name)
    assert seen == set(export.base.linears)
    for node in _nodes(model, "MatMulNBits"):
        assert node.attributes["bits"].value == bits
        assert node.attributes["accuracy_level"].value == 4


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("family", FAMILIES)
def test_onnxruntime_multiplies_with_them(branch_export: BranchFactory, family: str, bits: int) -> None:
    """Against PyTorch with the same weights; the merged model and the base alone are further away."""
    export = branch_export(family, **_plain(bits), accuracy_level=0)
    model, manifest = _graph(export)
    twin = load_twin(export.base)
    for weight in manifest.coded:
        for name, values in _values(model, weight).items():
            module = twin.get_submodule(name)
            module.weight.data = values.t().contiguous() if export.base.linears[name].is_conv1d else values  # type: ignore[union-attr]
    expected = [
        compute_logits(twin, batch.input_ids, batch.attention_mask) * batch.attention_mask[:, :, None]
        for batch in make_batches(export.base)
    ]
    found = run_export(export)
    assert distance(found, expected) < 1e-3
    assert distance(found, run_twin(export, None)) > 1e-1
    assert distance(found, run_twin(export, "own")) > 1e-3


def test_eight_bits_are_nearer_than_four_and_level_four_costs_something(branch_export: BranchFactory) -> None:
    trained = run_twin(branch_export("llama", **_plain(8), accuracy_level=0), "own")
    exports = [branch_export("llama", **_plain(bits), accuracy_level=0) for bits in (8, 4)]
    eight, four = (distance(run_export(export), trained) for export in exports)
    rounded = distance(run_export(branch_export("llama", **_plain(8), accuracy_level=4)), trained)
    alone = distance(run_twin(branch_export("llama", **_plain(8), accuracy_level=0), None), trained)
    assert eight < four < alone
    assert eight < rounded < alone


@pytest.mark.parametrize("head", [4, 8])
@pytest.mark.parametrize("tied", [True, False])
def test_embedding_and_head_are_codes_shared_where_they_are_tied(
    branch_export: BranchFactory, head: int, tied: bool
) -> None:
    base = SHORT["llama"] | {"tie_word_embeddings": tied}
    export = branch_export("llama", base=base, **_plain(4, head=head), accuracy_level=0)
    floats = branch_export("llama", base=base, **_plain(4), accuracy_level=0)
    model, manifest = _graph(export)
    (lookup,) = _nodes(model, "GatherBlockQuantized")
    assert lookup.attributes["bits"].value == head
    own = {module.name: weight for weight in manifest.coded for module in weight.modules}
    assert own["model.embed_tokens"].operator == ("MatMulNBits" if tied else "GatherBlockQuantized")
    assert ("lm_head" in own) is not tied
    assert not any(name == "embed_tokens.weight" or name == "lm_head.weight" for name in model.graph.initializers)
    parameters = MergedParameters(export.base, None)
    for name in ("model.embed_tokens", *(() if tied else ("lm_head",))):
        expected = round_plain(parameters.read(f"{name}.weight"), head, own[name].blocksize).dequantize()
        assert torch.equal(_values(model, own[name])[name], expected)
    spread = distance(run_export(export), run_export(floats))
    assert 1e-4 < spread < 10 * distance(run_export(floats), run_twin(floats, "own"))


def test_the_lookup_reads_the_rows_that_the_tokens_name(branch_export: BranchFactory) -> None:
    export = branch_export("llama", **_plain(4, head=8), accuracy_level=0)
    model, manifest = _graph(export)
    (lookup,) = _nodes(model, "GatherBlockQuantized")
    weight = next(one for one in manifest.coded if one.modules[0].name == "model.embed_tokens")
    values = _values(model, weight)["model.embed_tokens"]
    output = lookup.outputs[0]
    output.name, output.type = "looked_up", ir.TensorType(ir.DataType.FLOAT)
    output.shape = ir.Shape([1, 3, values.shape[1]])
    del model.graph.outputs[:]
    model.graph.outputs.append(output)
    proto = ir.to_proto(model)
    options = onnxruntime.SessionOptions()
    folder = "session.model_external_initializers_file_folder_path"
    options.add_session_config_entry(folder, str(export.output))
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options)
    session_feeds = {node.name: _empty(node) for node in session.get_inputs()}
    session_feeds["input_ids"] = np.array([[5, 0, 17]])
    found = session.run(["looked_up"], session_feeds)[0]
    np.testing.assert_array_equal(found[0], values[[5, 0, 17]].numpy())


def _empty(node: Any) -> np.ndarray:
    shape = [size if isinstance(size, int) else 0 for size in node.shape]
    if node.name.startswith("past"):
        return np.zeros((1, *shape[1:]), np.float32)
    return np.ones((1, 3), np.int64)


def test_a_width_that_no_block_divides_leaves_the_embedding_in_floats(branch_export: BranchFactory) -> None:
    model, manifest = _graph(branch_export("llama", base=ODD["llama"], **_plain(4, head=8)))
    assert not _nodes(model, "GatherBlockQuantized")
    assert not any("embed" in module.name for weight in manifest.coded for module in weight.modules)


def test_layers_that_are_kept_have_their_own_precision(branch_export: BranchFactory) -> None:
    keep = (("v_proj", 8), ("layers.0.mlp", None))
    export = branch_export("llama", **_plain(4, keep=keep), accuracy_level=0)
    model, manifest = _graph(export)
    schemes = {module.name: weight.scheme for weight in manifest.coded for module in weight.modules}
    assert schemes["model.layers.0.self_attn.v_proj"] == "int8"
    assert schemes["model.layers.0.self_attn.q_proj"] == "int4"
    assert not any(name.startswith("model.layers.0.mlp") for name in schemes)
    packed = [[module.name for module in weight.modules] for weight in manifest.coded]
    assert ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"] in packed
    trained = run_twin(export, "own")
    all_four = branch_export("llama", **_plain(4), accuracy_level=0)
    assert distance(run_export(export), trained) < distance(run_export(all_four), trained)
    assert {node.attributes["bits"].value for node in _nodes(model, "MatMulNBits")} == {4, 8}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_correction_brings_the_export_nearer(branch_export: BranchFactory, family: str) -> None:
    options = {"rows": 24}
    corrected = branch_export(family, **_plain(4, correction=56, **options), accuracy_level=0)
    alone = branch_export(family, **_plain(4, **options), accuracy_level=0)
    _, manifest = _graph(corrected)
    assert manifest.branch is None
    assert not manifest.slots
    assert {module for slot in manifest.correction for module in slot.modules} == set(corrected.base.linears)
    trained = run_twin(corrected, "own")
    assert distance(run_export(corrected), trained) < 0.3 * distance(run_export(alone), trained)


def test_fp16_graphs_store_fp16_scales(branch_export: BranchFactory) -> None:
    export = branch_export("llama", **_plain(4, head=8), accuracy_level=0, compute_dtype="fp16")
    model, manifest = _graph(export)
    for weight in manifest.coded:
        assert model.graph.initializers[weight.scales].dtype == ir.DataType.FLOAT16
        for module, values in _values(model, weight).items():
            if module in export.base.linears:
                merged = MergedParameters(export.base, read_adapter(export.adapters["own"])).read(f"{module}.weight")
                assert torch.equal(values, round_plain(merged, 4, 32, torch.float16).dequantize())
    in_floats = branch_export("llama", **_plain(4, head=8), accuracy_level=0)
    off = distance(run_export(in_floats), run_twin(in_floats, "own"))
    assert distance(run_export(export), run_export(in_floats)) < 0.3 * off


def test_an_adapter_on_the_head_breaks_the_tie(branch_export: BranchFactory) -> None:
    export = branch_export(
        "llama",
        base=SHORT["llama"] | {"tie_word_embeddings": True},
        adapters={"own": {"target_modules": ["lm_head", "q_proj"]}},
        **_plain(8, head=8),
        accuracy_level=0,
    )
    _, manifest = _graph(export)
    names = {module.name for weight in manifest.coded for module in weight.modules}
    assert {"lm_head", "model.embed_tokens"} <= names
    trained = run_twin(export, "own")
    assert distance(run_export(export), trained) < 0.2 * distance(run_twin(export, None), trained)


def test_the_same_input_gives_the_same_bytes_and_leaves_nothing_else(
    branch_export: BranchFactory, tmp_path: Path
) -> None:
    export = branch_export("llama", **_plain(4, rows=8))
    again = tmp_path / "again"
    options = {key: value for key, value in _plain(4, rows=8).items() if key != "branch"}
    export_onnx(export.base_dir, export.adapters, output=again, quantization="nf4", verify=False, **options)
    names = sorted(file.name for file in again.iterdir())
    assert names == sorted(file.name for file in export.output.iterdir())
    assert not any(name.startswith(".") for name in names)
    data = next(again.glob("*.data"))
    assert data.read_bytes() == (export.output / data.name).read_bytes()


@pytest.mark.parametrize("bits", [4, 8])
def test_codes_can_be_expanded_when_the_model_is_opened(branch_export: BranchFactory, bits: int) -> None:
    export = branch_export("llama", **_plain(bits, head=8), accuracy_level=0)
    batches = make_batches(export.base)
    session = OnnxSession(export.output, weights="expand")
    found = [run_batch(session, batch) for batch in batches]
    assert distance(found, run_export(export)) < 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "int4", "branch": "fixed"}, "needs --merge"),
        ({"precision": "nf4", "branch": None}, "needs --branch"),
        ({"precision": "fp32", "branch": None, "requantization": Requantization(4)}, "into codes anew"),
        ({"precision": "int8", "branch": None, "requantization": Requantization(4)}, "contradicts"),
        ({"precision": "fp32", "branch": None, "accuracy_level": 4}, "accuracy level"),
        ({"precision": "int4", "branch": None, "expand": True}, "can be expanded"),
    ],
)
def test_what_does_not_go_together_is_refused(
    branch_export: BranchFactory, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        branch_export("llama", **options)
