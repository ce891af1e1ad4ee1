"""Codes run another way: as float weights made when the model is opened, or by lora-deploy's own kernel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from lora_deploy.errors import UsageError
from lora_deploy.native import load_kernels
from lora_deploy.run import OnnxModel, OnnxSession
from lora_deploy.run import weights as weights_module
from lora_deploy.run.adapters import Adapters
from lora_deploy.run.weights import ExpandedWeights
from tests.conftest import QUANTIZED, token_ids
from tests.export.conftest import ODD, SHORT, BranchExport, BranchFactory

IDS = token_ids(2, 9).numpy()
MASK = np.ones_like(IDS)
# Blocks that cross rows, and a last one that is not full.
BASES: dict[str, dict[str, Any]] = {
    "even": SHORT["llama"],
    "odd": ODD["llama"],
    "40": SHORT["llama"] | {"hidden_size": 40, "intermediate_size": 100, "head_dim": 10},
    "72": SHORT["llama"] | {"hidden_size": 72, "intermediate_size": 100, "head_dim": 18},
}


def _logits(session: OnnxSession, inputs: Any = None) -> np.ndarray:
    """Of a prompt, of the next three tokens together, and of one alone: kernels differ by the number of rows."""
    parts, cache, start = [], None, 0
    for end in (IDS.shape[1] - 4, IDS.shape[1] - 1, IDS.shape[1]):
        logits, cache = session.forward(IDS[:, start:end], MASK[:, :end], cache, inputs)
        parts.append(logits)
        start = end
    return np.concatenate(parts, axis=1)


def _run(export: BranchExport, weights: Any, adapter: str | None = None) -> np.ndarray:
    session = OnnxSession(export.output, weights=weights)
    inputs = Adapters(session, export.output).inputs(adapter) if adapter else None
    return _logits(session, inputs)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("expand", [False, True], ids=["operator", "expand"])
@pytest.mark.parametrize("method", QUANTIZED)
def test_expanded_weights_compute_what_the_exact_float_export_computes(
    method: str, expand: bool, base: str, branch_export: BranchFactory
) -> None:
    export = branch_export("llama", method, base=BASES[base], expand=expand)
    exact = branch_export("llama", method, base=BASES[base], precision="fp32")
    for adapter in (None, "own"):
        expanded = _run(export, "expand", adapter)
        expected = _run(exact, "stored", adapter)
        assert np.abs(expanded - _run(export, "stored", adapter)).max() < 1e-4
        if base in ("even", "72"):
            assert np.array_equal(expanded, expected)
        else:  # q, k and v are products of their own there, in which onnxruntime adds in another order
            assert np.abs(expanded - expected).max() < 1e-4
        assert np.abs(expected).max() > 1


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("expand", [False, True], ids=["operator", "expand"])
@pytest.mark.parametrize("method", QUANTIZED)
def test_the_values_are_the_bases_bit_for_bit(
    method: str, expand: bool, base: str, branch_export: BranchFactory
) -> None:
    export = branch_export("llama", method, base=BASES[base], expand=expand)
    expanded = ExpandedWeights(export.output / "model.onnx", onnxruntime.SessionOptions())
    training, seen = export.base, 0
    for weight, _, array in expanded._arrays.values():
        start = 0
        for module in weight.modules:
            rows = array[start : start + module.shape[0]]
            assert np.array_equal(rows, training.weight(module.name).dequantize().numpy())
            start += module.shape[0]
            seen += 1
        assert start == len(array)
    assert seen == len(training.linears)


@pytest.mark.parametrize("method", ["nf4", "int8"])
@pytest.mark.parametrize("expand", [False, True], ids=["operator", "expand"])
def test_float16_is_expanded_too(method: str, expand: bool, branch_export: BranchFactory) -> None:
    export = branch_export("llama", method, compute_dtype="fp16", expand=expand)
    exact = branch_export("llama", method, precision="fp16")
    expanded, expected = _run(export, "expand", "own"), _run(exact, "stored", "own")
    assert np.isfinite(expanded).all()
    assert np.abs(expanded - expected).max() < 0.05 * np.abs(expected).max()
    assert np.abs(expanded - _run(export, "stored", "own")).max() < 0.05 * np.abs(expected).max()


@pytest.mark.parametrize("branch", ["fixed", "pooled"])
def test_other_branches_are_expanded_too(branch: str, branch_export: BranchFactory) -> None:
    export = branch_export("llama", "nf4", branch)
    adapter = "own" if branch == "pooled" else None
    assert np.abs(_run(export, "expand", adapter) - _run(export, "stored", adapter)).max() < 1e-4


@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
def test_other_families_are_expanded_too(family: str, branch_export: BranchFactory) -> None:
    """Biases; GPT-2's transposed weights and its one layer for q, k and v."""
    export = branch_export(family, "nf4", base=ODD[family])
    assert np.abs(_run(export, "expand", "own") - _run(export, "stored", "own")).max() < 1e-4


@pytest.mark.parametrize("options", [{"branch": None}, {"precision": "fp32"}, {"branch": "fixed", "method": "none"}])
def test_where_there_is_nothing_to_expand_it_runs_as_stored(
    options: dict[str, Any], branch_export: BranchFactory
) -> None:
    export = branch_export("llama", **({"method": "nf4"} | options))
    assert np.array_equal(_run(export, "expand"), _run(export, "stored"))


def test_the_memory_is_given_back_and_the_session_does_not_notice(branch_export: BranchFactory) -> None:
    export = branch_export("llama", "nf4")
    session = OnnxSession(export.output, weights="expand")
    first = _logits(session)
    arrays = [array for _, _, array in session._weights._arrays.values()]
    assert not any(array.any() for array in arrays)  # onnxruntime on a CPU has packed copies
    session._weights.release(session.session)
    assert np.array_equal(_logits(session), first)


@pytest.mark.parametrize("expand", [False, True], ids=["operator", "expand"])
def test_weights_that_are_still_read_are_filled_again(
    expand: bool, branch_export: BranchFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A session that has not packed anything reads the memory it was given."""
    export = branch_export("llama", "nf4", expand=expand)
    expected = _run(export, "expand")
    real = onnxruntime.SessionOptions

    def unpacked() -> Any:
        options = real()
        options.add_session_config_entry("session.disable_prepacking", "1")
        return options

    monkeypatch.setattr(onnxruntime, "SessionOptions", unpacked)
    session = OnnxSession(export.output, weights="expand")
    assert all(array.any() for _, _, array in session._weights._arrays.values())
    assert np.abs(_logits(session) - expected).max() < 1e-4


def test_filling_again_gives_the_same_values(branch_export: BranchFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    export = branch_export("llama", "nf4", base=BASES["odd"])
    before = ExpandedWeights(export.output / "model.onnx", onnxruntime.SessionOptions())
    expected = _run(export, "expand")
    with monkeypatch.context() as patch:
        patch.setattr(weights_module.np, "array_equal", lambda *arrays, **options: False)
        session = OnnxSession(export.output, weights="expand")
    for name, (_, _, array) in session._weights._arrays.items():
        assert np.array_equal(array, before._arrays[name][2])
    assert np.array_equal(_logits(session), expected)


@pytest.fixture(scope="module")
def _kernels(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        try:
            load_kernels()
        except UsageError as error:
            pytest.skip(f"no kernels here: {error.summary}")
        yield


@pytest.mark.usefixtures("_kernels")
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("method", QUANTIZED)
def test_the_native_kernel_computes_what_the_operator_does(
    method: str, base: str, branch_export: BranchFactory
) -> None:
    export = branch_export("llama", method, base=BASES[base])
    for adapter in (None, "own"):
        expected = _run(export, "stored", adapter)
        assert np.abs(_run(export, "native", adapter) - expected).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.usefixtures("_kernels")
@pytest.mark.parametrize(
    "options",
    [
        {"method": "none"},
        {"method": "int8", "expand": True},
        {"expand": True},
        {"precision": "fp32"},
        {"precision": "int8"},
        {"compute_dtype": "fp16"},
        {"branch": None},
    ],
    ids=str,
)
def test_the_native_kernel_is_refused_where_it_is_not_for_the_graph(
    options: dict[str, Any], branch_export: BranchFactory
) -> None:
    export = branch_export("llama", **({"method": "nf4"} | options))
    with pytest.raises(UsageError, match="native kernel") as caught:
        OnnxSession(export.output, weights="native")
    assert "--branch" in caught.value.details["expected"]


@pytest.mark.parametrize("kind", [OnnxSession, OnnxModel])
def test_an_unknown_way_is_an_error_of_usage(kind: Any, branch_export: BranchFactory) -> None:
    with pytest.raises(UsageError, match="cannot run this way") as caught:
        kind(branch_export("llama", "nf4").output, weights="magic")
    assert caught.value.details["found"] == "magic"
    assert caught.value.details["expected"] == "stored, expand, native"


@pytest.mark.parametrize("weights", ["expand", "native"])
def test_a_damaged_graph_is_named_whichever_way_it_runs(weights: Any, tmp_path: Path) -> None:
    from lora_deploy.errors import CheckpointError

    (tmp_path / "model.onnx").write_bytes(b"\xff" * 64)
    with pytest.raises(CheckpointError) as caught:
        OnnxSession(tmp_path, weights=weights)
    assert caught.value.details["file"] == str(tmp_path / "model.onnx")
