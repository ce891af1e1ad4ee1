"""Codes in the graph: bitsandbytes' own bytes, and exactly its values, by the operator and by standard ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import bitsandbytes as bnb
import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass
from safetensors.torch import load_file

from lora_deploy.manifest import CodedWeight, Manifest
from lora_deploy.quantization import QuantizationScheme
from lora_deploy.quantization.base import TrainingBase
from tests.conftest import QUANTIZED
from tests.export.conftest import ODD, SHORT, BranchExport, BranchFactory

Arrays = dict[str, np.ndarray]
NARROW = {"hidden_size": 40, "intermediate_size": 100, "head_dim": 10}  # q and k are one initializer, v another
WIDE = {"hidden_size": 72, "intermediate_size": 100}
BASES: dict[str, dict[str, Any]] = {
    "llama": SHORT["llama"],
    "llama-odd": ODD["llama"],
    "llama-narrow": SHORT["llama"] | NARROW,
    "llama-wide": SHORT["llama"] | WIDE,
    "qwen2": SHORT["qwen2"],
    "gpt2": SHORT["gpt2"],
    "gpt2-odd": ODD["gpt2"],
}


class Oracle(NamedTuple):
    """What bitsandbytes makes of one weight."""

    codes: np.ndarray
    scales: np.ndarray  # expanded absmax, or SCB / 127
    values: np.ndarray  # float32 (out, in)


def _oracle(values: torch.Tensor, scheme: QuantizationScheme) -> Oracle:
    """bitsandbytes' codes and absmax; the product of the two by its own definition, in numpy."""
    if scheme.method == "int8":
        codes, absmax, _ = bnb.functional.int8_vectorwise_quant(values.half().contiguous())
        scales = (absmax.float() / 127).numpy()
        return Oracle(codes.numpy(), scales, codes.numpy().astype(np.float32) * scales[:, None])
    packed, state = bnb.functional.quantize_4bit(
        values.contiguous(),
        blocksize=scheme.blocksize,
        compress_statistics=scheme.double_quant,
        quant_type=scheme.method,
    )
    absmax = state.absmax
    if state.nested:
        absmax = bnb.functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    raw = packed.reshape(-1).numpy()
    nibbles = np.stack([raw >> 4, raw & 15], axis=1).reshape(-1)[: values.numel()]
    scales = absmax.float().numpy()
    flat = state.code.numpy()[nibbles] * scales[np.arange(values.numel()) // scheme.blocksize]
    return Oracle(raw, scales, flat.reshape(values.shape))


def _dense(export: BranchExport, module: str, dense: Path) -> torch.Tensor:
    """The weight (out, in) before any quantization, from the dense checkpoint itself."""
    tensors, name = load_file(dense / "model.safetensors"), f"{module}.weight"
    values = tensors[name] if name in tensors else tensors[name.removeprefix("transformer.")]
    return values.t() if export.base.linears[module].is_conv1d else values


def _initializers(export: BranchExport) -> Arrays:
    graph = ir.load(export.output / "model.onnx").graph
    return {name: value.const_value.numpy() for name, value in graph.initializers.items()}  # type: ignore[union-attr]


def _products_with_the_identity(export: BranchExport) -> Arrays:
    """What onnxruntime makes of an identity matrix with each coded weight of the graph: (in, out)."""
    model = ir.load(export.output / "model.onnx")
    values = {output.name: output for node in model.graph for output in node.outputs}
    inputs: dict[int, ir.Value] = {}
    names, outputs = [], []
    for weight in Manifest.load(export.output).coded:
        node = values[weight.output].producer()
        if weight.operator == "expand":
            (transpose,) = values[weight.output].consumers()
            (node,) = transpose.outputs[0].consumers()
        assert node is not None
        width = weight.shape[1]
        x = inputs.setdefault(width, ir.val(f"x{width}", dtype=ir.DataType.FLOAT, shape=(width, width)))
        node.replace_input_with(0, x)
        node.outputs[0].name, node.outputs[0].type = f"{weight.codes}.product", ir.TensorType(ir.DataType.FLOAT)
        names.append(weight.codes)
        outputs.append(node.outputs[0])
    del model.graph.outputs[:]
    del model.graph.inputs[:]
    model.graph.outputs.extend(outputs)
    model.graph.inputs.extend(inputs.values())
    RemoveUnusedNodesPass()(model)
    file = export.output / "identity.onnx"
    ir.save(model, file)
    try:
        session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    finally:
        file.unlink()
    feeds = {str(x.name): np.eye(width, dtype=np.float32) for width, x in inputs.items()}
    return dict(zip(names, session.run(None, feeds), strict=True))


def _check_bytes(weight: CodedWeight, arrays: Arrays, oracles: list[Oracle], scheme: QuantizationScheme) -> None:
    codes, scales = arrays[weight.codes], arrays[weight.scales].reshape(-1)
    rows, columns = weight.shape
    if scheme.method == "int8":
        expected = np.concatenate([oracle.codes for oracle in oracles])
        if weight.operator != "expand":
            assert codes.dtype == np.uint8
            codes = codes.astype(np.int16).reshape(rows, -1) - 128
            assert not codes[:, columns:].any()
            scales = scales.reshape(rows, -1)
            assert (scales == scales[:, :1]).all()
            scales = scales[:, 0]
        assert np.array_equal(codes[:, :columns], expected)
        assert np.array_equal(scales, np.concatenate([oracle.scales for oracle in oracles]))
        return
    raw = np.concatenate([oracle.codes for oracle in oracles])
    assert codes.dtype == np.uint8
    assert codes.reshape(-1)[: len(raw)].tobytes() == raw.tobytes()
    assert not codes.reshape(-1)[len(raw) :].any()
    repeated = np.concatenate([oracle.scales.repeat(scheme.blocksize // weight.blocksize) for oracle in oracles])
    assert np.array_equal(scales, repeated[: len(scales)])
    assert len(scales) * weight.blocksize >= rows * columns


def _check(export: BranchExport, dense: Path) -> list[CodedWeight]:
    """Every linear layer that is quantized is there once, byte for byte and value for value."""
    manifest, arrays = Manifest.load(export.output), _initializers(export)
    products = _products_with_the_identity(export)
    for weight in manifest.coded:
        assert weight.exact
        oracles = [_oracle(_dense(export, module.name, dense), export.scheme) for module in weight.modules]
        _check_bytes(weight, arrays, oracles, export.scheme)
        values = np.concatenate([oracle.values for oracle in oracles])
        assert np.array_equal(products[weight.codes].T, values)
        assert all(len(module.sha256) == 64 for module in weight.modules)
    found = [module.name for weight in manifest.coded for module in weight.modules]
    assert sorted(found) == sorted(name for name in export.base.linears if export.scheme.applies_to(name))
    return list(manifest.coded)


@pytest.mark.parametrize("expand", [False, True], ids=["operator", "expanded"])
@pytest.mark.parametrize("method", QUANTIZED)
@pytest.mark.parametrize(
    ("kind", "stored"),
    [*((kind, False) for kind in BASES), ("llama-odd", True), ("qwen2", True), ("gpt2", True)],
    ids=lambda value: {False: "dense", True: "quantized"}.get(value, value),
)
def test_the_graph_holds_bitsandbytes_codes_and_computes_its_values_bit_for_bit(
    kind: str, method: str, stored: bool, expand: bool, branch_export: BranchFactory, checkpoint_dir: Any
) -> None:
    family, fields = kind.partition("-")[0], BASES[kind]
    export = branch_export(family, method, base=fields, stored=stored, adapters={}, expand=expand)
    coded = _check(export, checkpoint_dir(family, **fields))
    if family == "gpt2":  # c_attn is three layers in the graph, and one initializer
        assert [len(weight.modules) for weight in coded] == [1] * 8
        assert coded[0].modules[0].name == "transformer.h.0.attn.c_attn"
    elif method == "int8" or kind in ("llama", "qwen2"):
        assert [len(weight.modules) for weight in coded] == [3, 1, 2, 1] * 2
    elif kind == "llama-narrow":
        assert [len(weight.modules) for weight in coded[:2]] == [2, 1]
    elif kind == "llama-wide":  # of gate and up, the first ends inside a block
        assert [len(weight.modules) for weight in coded[:5]] == [3, 1, 1, 1, 1]
    else:
        assert [len(weight.modules) for weight in coded] == [1] * 14


@pytest.mark.parametrize("stored", [False, True], ids=["dense", "quantized"])
@pytest.mark.parametrize("method", ["nf4", "fp4"])
def test_codes_of_a_checkpoint_are_copied_byte_for_byte(
    method: str, stored: bool, branch_export: BranchFactory, checkpoint_dir: Any
) -> None:
    """What transformers saved is in the file as it is, also where q, k and v are one initializer."""
    export = branch_export("qwen2", method, base=SHORT["qwen2"], stored=stored, adapters={})
    saved = load_file(checkpoint_dir("qwen2", method, **SHORT["qwen2"]) / "model.safetensors")
    arrays = _initializers(export)
    for weight in Manifest.load(export.output).coded:
        raw = b"".join(saved[f"{module.name}.weight"].numpy().tobytes() for module in weight.modules)
        assert arrays[weight.codes].tobytes() == raw


@pytest.mark.parametrize("expand", [False, True], ids=["operator", "expanded"])
@pytest.mark.parametrize(("blocksize", "double_quant"), [(32, True), (128, False), (512, True), (4096, False)])
def test_any_block_size_of_the_training_is_kept_or_cut_without_changing_a_value(
    blocksize: int, double_quant: bool, expand: bool, branch_export: BranchFactory, checkpoint_dir: Any
) -> None:
    """MatMulBnb4 has no block of more than 256 on the CPU: the absmax of a larger one is repeated."""
    scheme = QuantizationScheme(method="nf4", blocksize=blocksize, double_quant=double_quant)
    export = branch_export("llama", "nf4", base=ODD["llama"], scheme=scheme, expand=expand)
    coded = _check(export, checkpoint_dir("llama", **ODD["llama"]))
    assert {weight.blocksize for weight in coded} == {blocksize if expand else min(blocksize, 256)}


@pytest.mark.parametrize("method", QUANTIZED)
@pytest.mark.parametrize(
    ("skipped", "runs"),
    [
        ("k_proj", ["Concat", "q_proj", "v_proj"]),
        ("q_proj", ["Concat", "k_proj+v_proj"]),
        ("down_proj", ["q_proj+k_proj+v_proj"]),
    ],
)
def test_a_layer_that_was_left_alone_in_training_stays_dense_beside_the_codes_of_its_site(
    skipped: str, runs: list[str], method: str, branch_export: BranchFactory, checkpoint_dir: Any
) -> None:
    scheme = QuantizationScheme(method=method, skip_modules=(skipped,))  # type: ignore[arg-type]
    export = branch_export("llama", method, scheme=scheme, verify=True)
    coded = _check(export, checkpoint_dir("llama", **SHORT["llama"]))
    first = [
        weight for weight in coded if "layers.0.self_attn.q" in weight.codes or "layers.0.self_attn.k" in weight.codes
    ]
    joined = ["+".join(module.name.rpartition(".")[2] for module in weight.modules) for weight in first]
    concats = [node for node in ir.load(export.output / "model.onnx").graph if str(node.name).endswith(".concat")]
    assert (["Concat"] if concats else []) + joined == runs
    assert not any(name.endswith(f"{skipped}.weight.codes") for name in _initializers(export))
    assert export.result.report is not None
    assert export.result.report.passed


def test_the_hash_in_the_manifest_is_that_of_the_bases_own_codes(branch_export: BranchFactory) -> None:
    """The same for both ways to store them, and for a checkpoint that transformers quantized."""
    hashes = []
    for options in ({}, {"expand": True}, {"stored": True}, {"precision": "int8"}):
        coded = Manifest.load(branch_export("llama", "nf4", adapters={}, **options).output).coded
        hashes.append({module.name: module.sha256 for weight in coded for module in weight.modules})
        assert all(weight.exact == ("precision" not in options) for weight in coded)
    assert hashes[0] == hashes[1] == hashes[2] == hashes[3]
    assert len(set(hashes[0].values())) == len(hashes[0]) == 14
    base = TrainingBase(branch_export("llama", "nf4", adapters={}).base_dir, QuantizationScheme(method="nf4"))
    assert set(hashes[0]) == set(base.linears)
