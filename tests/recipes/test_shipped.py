"""Every recipe that is shipped exports a tiny model, and the graph is what the recipe says."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from lora_deploy.adapter import write_adapter
from lora_deploy.export import ExportResult, export_onnx
from lora_deploy.manifest import Manifest
from lora_deploy.recipes import Recipe, load_recipe, shipped_recipes
from lora_deploy.run import OnnxSession
from lora_deploy.run.adapters import Adapters
from tests.classifiers import ClassifierFactory, classifier_dir, peft_adapter, remembered_traces
from tests.conftest import CheckpointFactory, random_adapter, tiny_model
from tests.export.conftest import SHORT

__all__ = ["classifier_dir", "peft_adapter", "remembered_traces"]

Exported = tuple[Recipe, ExportResult, Path]
Export = Callable[..., Exported]


@pytest.fixture(scope="module")
def exported(
    checkpoint_dir: CheckpointFactory,
    classifier_dir: ClassifierFactory,
    peft_adapter: ClassifierFactory,
    tmp_path_factory: pytest.TempPathFactory,
) -> Export:
    """`exported(name)`: the recipe, what it made of a tiny model, and the model; made once, on little text."""
    made: dict[str, Exported] = {}

    def make(name: str) -> Exported:
        if name in made:
            return made[name]
        recipe = load_recipe(name)
        root = tmp_path_factory.mktemp(name)
        adapters: dict[str, str | Path] = {}
        if name == "encoder-classifier":
            base, adapters["own"] = classifier_dir("bert"), peft_adapter("bert")
        else:
            family = "gpt2" if name == "gpt2-conv1d" else "llama"
            fields = SHORT[family]
            base = checkpoint_dir(family, **fields)
            config: dict[str, Any] = {"fan_in_fan_out": True} if family == "gpt2" else {}
            several = recipe.mode in ("hot-swap", "pooled")
            for number, adapter in enumerate(("own", "other") if several else ("own",)):
                adapters[adapter] = root / adapter
                write_adapter(random_adapter(tiny_model(family, **fields), seed=number + 1, **config), root / adapter)
        options = recipe.model_copy(update={"calibration_rows": min(recipe.calibration_rows, 16)}).options()
        method = "none" if name in ("encoder-classifier", "gpt2-conv1d") else "nf4"
        options |= {"quantization": method}
        made[name] = (recipe, export_onnx(base, adapters, output=root / "out", **options), base)
        return made[name]

    return make


def _graph(result: ExportResult) -> ir.Graph:
    return ir.load(result.output / "model.onnx").graph


def _operators(result: ExportResult) -> Counter[str]:
    return Counter(node.op_type for node in _graph(result))


def _logits(directory: Path, adapter: str | None = None) -> np.ndarray[Any, np.dtype[np.float32]]:
    session = OnnxSession(directory)
    ids = np.arange(3, 12)[None]
    return session.forward(ids, np.ones_like(ids), adapter=Adapters(session, directory).inputs(adapter))[0]


@pytest.mark.parametrize("name", shipped_recipes())
def test_it_exports_what_was_trained(name: str, exported: Export) -> None:
    """The parity check passes, on the CPU, and what it is compared with in the place of the model fails."""
    recipe, result, _ = exported(name)
    manifest = Manifest.load(result.output)
    assert recipe.name == name
    assert manifest.branch == (None if recipe.mode == "merge" else recipe.mode)
    assert result.warnings == ()
    assert result.report is not None
    assert result.report.passed
    assert result.report.control_failed
    note = f"onnxruntime has no {recipe.provider} provider here: checked on the CPU"
    assert (note in result.report.notes) == (recipe.provider != "cpu")


@pytest.mark.parametrize("name", ["qlora-lossless-cuda", "qlora-lossless-cpu"])
def test_lossless_keeps_the_codes_beside_a_branch_that_is_built_in(name: str, exported: Export) -> None:
    recipe, result, _ = exported(name)
    operators, manifest = _operators(result), Manifest.load(result.output)
    assert operators["MatMulBnb4"] == 8
    assert {weight.scheme for weight in manifest.coded} == {"nf4"}
    assert manifest.compute_dtype == recipe.compute_dtype == ("fp16" if recipe.provider == "cuda" else "fp32")
    assert [value.name for value in _graph(result).inputs if "lora" in str(value.name)] == []
    assert result.report is not None
    assert result.report.codes is not None
    assert result.report.codes.exact


def test_the_lossless_one_for_cpus_runs_on_the_native_kernels(exported: Export) -> None:
    from lora_deploy.errors import UsageError

    _, result, _ = exported("qlora-lossless-cpu")
    ids = np.arange(3, 12)[None]
    try:
        native = OnnxSession(result.output, weights="native").forward(ids, np.ones_like(ids))[0]
    except UsageError as error:
        pytest.skip(f"no kernels here: {error.summary}")
    assert np.abs(native - _logits(result.output)).max() < 1e-3


def test_merged_fp16_has_no_codes_and_no_branch(exported: Export) -> None:
    _, result, _ = exported("merged-fp16-cuda")
    types = {value.dtype for value in _graph(result).initializers.values() if len(value.shape or ()) == 2}
    assert types == {ir.DataType.FLOAT16}
    assert not {"MatMulBnb4", "MatMulNBits"} & set(_operators(result))
    assert Manifest.load(result.output).coded == ()


@pytest.mark.parametrize(
    ("name", "bits", "level", "dtype"),
    [
        ("merged-int4-cpu", 4, 4, ir.DataType.FLOAT),
        ("merged-int8-cpu", 8, 4, ir.DataType.FLOAT),
        ("webgpu-int4", 4, 4, ir.DataType.FLOAT16),
    ],
)
def test_merged_codes_have_their_bits_and_their_level(
    name: str, bits: int, level: int, dtype: ir.DataType, exported: Export, tmp_path: Path
) -> None:
    """They compute about what the merged model does, as far as 4 bits hold random weights, not what the base does."""
    recipe, result, base = exported(name)
    graph = _graph(result)
    products = [node for node in graph if node.op_type == "MatMulNBits"]
    found = Counter(node.attributes["bits"].as_int() for node in products)
    assert found == ({4: 8, 8: 1} if bits == 4 else {8: 9})  # the head in 8
    for node in products:
        assert node.attributes["block_size"].as_int() == 32
        assert node.attributes["accuracy_level"].as_int() == level
        assert node.inputs[2] is not None
        assert node.inputs[2].dtype == dtype
    assert _operators(result)["GatherBlockQuantized"] == 1
    assert _operators(result)["FusedMatMul"] == 0
    floats = {"merge": True, "quantization": "nf4", "verify": False, "precision": "fp32"}
    merged = export_onnx(base, result.output.parent / "own", output=tmp_path / "merged", **floats)  # type: ignore[arg-type]
    bare = export_onnx(base, None, output=tmp_path / "bare", **floats)  # type: ignore[arg-type]
    expected, control, logits = _logits(merged.output), _logits(bare.output), _logits(result.output)
    assert recipe.calibration_rows == 96
    error, apart = (np.sqrt(np.mean((one - expected) ** 2)) for one in (logits, control))
    assert error < apart / (2 if bits == 4 else 10)


def test_hot_swap_takes_each_adapter_from_an_int8_file(exported: Export) -> None:
    _, result, _ = exported("hot-swap-many-adapters")
    names = {file.stem for file in (result.output / "adapters").iterdir()}
    assert names == {"own", "other"}
    inputs = {str(value.name): value.dtype for value in _graph(result).inputs}
    assert ir.DataType.INT8 in {dtype for name, dtype in inputs.items() if "lora" in name}
    assert _operators(result)["MatMulBnb4"] == 8
    bare, own, other = (_logits(result.output, name) for name in (None, "own", "other"))
    assert min(np.abs(one - two).max() for one, two in ((bare, own), (bare, other), (own, other))) > 0.1


def test_pooled_serves_a_mixed_batch(exported: Export) -> None:
    _, result, _ = exported("pooled-mixed-batch")
    manifest = Manifest.load(result.output)
    assert manifest.pool == ("own", "other")
    assert (manifest.precision, manifest.compute_dtype) == ("nf4", "fp16")
    assert "adapter_ids" in {value.name for value in _graph(result).inputs}
    assert _operators(result)["Where"] >= 8
    session = OnnxSession(result.output)
    ids = np.tile(np.arange(3, 12), (3, 1))
    inputs = Adapters(session, result.output).row_inputs(["own", "other", None])
    logits = session.forward(ids, np.ones_like(ids), adapter=inputs)[0]
    assert min(np.abs(logits[one] - logits[two]).max() for one, two in ((0, 1), (0, 2), (1, 2))) > 0.1


def test_gpt2_is_merged_from_conv1d(exported: Export) -> None:
    _, result, _ = exported("gpt2-conv1d")
    config = json.loads((result.output.parent / "own" / "adapter_config.json").read_text())
    assert config["fan_in_fan_out"] is True
    assert Manifest.load(result.output).coded == ()
    assert not {"MatMulBnb4", "MatMulNBits"} & set(_operators(result))
    assert any(case.control is not None and case.control.max_abs > 0.1 for case in result.report.cases)  # type: ignore[union-attr]


def test_the_classifier_has_its_trained_head(exported: Export) -> None:
    _, result, _ = exported("encoder-classifier")
    assert Manifest.load(result.output).task == "sequence-classification"
    assert {str(value.shape) for value in _graph(result).outputs} == {"[batch,3]"}
    assert not (result.output / "genai_config.json").exists()


@pytest.mark.parametrize("name", ["merged-fp16-cuda", "webgpu-int4"])
def test_genai_is_told_the_provider(name: str, exported: Export) -> None:
    recipe, result, _ = exported(name)
    config = json.loads((result.output / "genai_config.json").read_text())
    (options,) = config["model"]["decoder"]["session_options"]["provider_options"]
    assert list(options) == [recipe.provider]
    if recipe.provider == "webgpu":  # its cache grows, so that the graph cannot be captured
        assert options["webgpu"]["enableGraphCapture"] == "0"
