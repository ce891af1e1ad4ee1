"""Adapters of an open export: switched, blended, added while it runs, chosen from a pool, and refused."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from lora_deploy.adapter import read_adapter, write_adapter
from lora_deploy.errors import AdapterError, UsageError
from lora_deploy.export import export_onnx
from lora_deploy.integrity import find_adapters
from lora_deploy.run import OnnxSession
from lora_deploy.run.adapter_files import read_onnx_adapter
from lora_deploy.run.adapters import Adapters
from lora_deploy.verify.reference import compute_logits, load_twin
from tests.conftest import CheckpointFactory, token_ids
from tests.export.conftest import BranchExport, BranchFactory

ADAPTERS = {"own": {}, "wide": {"r": 8, "seed": 3}, "narrow": {"r": 2, "seed": 4, "target_modules": ["q_proj"]}}
IDS = token_ids(3, 7).numpy()
MASK = np.ones_like(IDS)


@pytest.fixture
def hot_swap(branch_export: BranchFactory) -> BranchExport:
    return branch_export("llama", "nf4", adapters=ADAPTERS)


@pytest.fixture
def pooled(branch_export: BranchFactory) -> BranchExport:
    return branch_export("llama", "nf4", "pooled", adapters=ADAPTERS)


def _open(export: BranchExport | Path) -> tuple[OnnxSession, Adapters]:
    directory = export if isinstance(export, Path) else export.output
    session = OnnxSession(directory)
    return session, Adapters(session, directory)


def _logits(session: OnnxSession, inputs: Any = None) -> np.ndarray:
    """Of a prompt and of one token after it."""
    first, cache = session.forward(IDS[:, :-1], MASK[:, :-1], None, inputs)
    last, _ = session.forward(IDS[:, -1:], MASK, cache, inputs)
    return np.concatenate([first, last], axis=1)


def _twin_of_sum(export: BranchExport, weights: dict[str, float]) -> np.ndarray:
    """The twin with the weighted sum of the updates in its weights."""
    twin = load_twin(export.base)
    for name, weight in weights.items():
        for module, update in read_adapter(export.adapters[name]).updates.items():
            delta = update.scaling * update.B.float() @ update.A.float()
            twin.get_submodule(module).weight.data += weight * delta  # type: ignore[operator]
    return compute_logits(twin, torch.from_numpy(IDS), torch.from_numpy(MASK)).numpy()


def test_switching_gives_each_time_what_a_fresh_session_gives_bit_for_bit(hot_swap: BranchExport) -> None:
    fresh = {}
    for name in (None, *ADAPTERS):
        session, adapters = _open(hot_swap)
        fresh[name] = _logits(session, adapters.inputs(name))
    assert all(np.abs(fresh[None] - fresh[name]).max() > 0.1 for name in ADAPTERS)
    session, adapters = _open(hot_swap)
    for name in ("own", None, "wide", "narrow", "own", "own", None, "narrow", "wide"):
        assert np.array_equal(_logits(session, adapters.inputs(name)), fresh[name])


def test_an_adapter_is_read_and_uploaded_once(hot_swap: BranchExport) -> None:
    _, adapters = _open(hot_swap)
    first = adapters.inputs("own")
    adapters.inputs("wide")
    assert adapters.inputs("own") is first


@pytest.mark.parametrize("name", ["own", "narrow"])
def test_with_bindings_the_adapter_counts_as_it_does_in_a_plain_run(name: str, hot_swap: BranchExport) -> None:
    """With onnxruntime's own LoraAdapter, which a run with bindings ignores, and with arrays as inputs."""
    session, adapters = _open(hot_swap)
    inputs = adapters.inputs(name)
    found, _ = session.forward(IDS, MASK, None, inputs)
    feeds = {"input_ids": IDS, "attention_mask": MASK}
    if session.has_position_ids:
        feeds["position_ids"] = np.cumsum(MASK, axis=1) - 1
    feeds |= {key: value.numpy() for key, value in session.empty_cache(len(IDS)).items()}
    given = feeds | {key: value.numpy() for key, value in inputs.items()}
    assert np.array_equal(session.session.run(["logits"], given)[0], found)
    lora = onnxruntime.LoraAdapter()
    lora.Load(str(find_adapters(hot_swap.output)[name]))
    options = onnxruntime.RunOptions()
    options.add_active_adapter(lora)
    assert np.array_equal(session.session.run(["logits"], feeds, options)[0], found)
    bare, _ = session.forward(IDS, MASK)
    assert np.array_equal(session.session.run(["logits"], feeds)[0], bare)
    assert np.abs(bare - found).max() > 0.1


def test_the_tensors_outlive_the_file(hot_swap: BranchExport, tmp_path: Path) -> None:
    """They were views of a closed file once."""
    session, adapters = _open(hot_swap)
    expected = _logits(session, adapters.inputs("wide"))
    copy = Path(shutil.copytree(hot_swap.output, tmp_path / "copy"))
    other, others = _open(copy)
    tensors = read_onnx_adapter(find_adapters(copy)["wide"], other.manifest)  # type: ignore[arg-type]
    kept = {name: values.copy() for name, values in tensors.items()}
    inputs = others.inputs("wide")
    for file in find_adapters(copy).values():
        file.write_bytes(bytes(file.stat().st_size))
        file.unlink()
    gc.collect()
    np.full(1 << 20, np.nan)
    assert all(np.array_equal(tensors[name], kept[name]) for name in kept)
    assert np.array_equal(_logits(other, inputs), expected)
    assert np.array_equal(_logits(other, others.inputs("wide")), expected)


@pytest.mark.parametrize("weights", [{"own": 0.3, "wide": 0.7}, {"own": 1.0, "narrow": -0.5, "wide": 0.25}], ids=str)
def test_a_blend_is_the_twin_with_the_summed_update(weights: dict[str, float], hot_swap: BranchExport) -> None:
    session, adapters = _open(hot_swap)
    found = _logits(session, adapters.inputs(weights))
    assert np.abs(found - _twin_of_sum(hot_swap, weights)).max() < 1e-3
    assert np.abs(found - _logits(session)).max() > 0.1


def test_a_blend_of_one_whole_adapter_is_that_adapter(hot_swap: BranchExport) -> None:
    session, adapters = _open(hot_swap)
    own = _logits(session, adapters.inputs("own"))
    assert np.array_equal(_logits(session, adapters.inputs({"own": 1.0})), own)
    assert np.array_equal(_logits(session, adapters.inputs({"own": 1})), own)
    assert np.abs(_logits(session, adapters.inputs({"own": 1.0, "wide": 0.0})) - own).max() < 1e-5
    assert np.array_equal(_logits(session, adapters.inputs("own")), own)  # blends leave the parts alone


def test_a_blend_without_weight_is_the_base(hot_swap: BranchExport) -> None:
    session, adapters = _open(hot_swap)
    assert np.abs(_logits(session, adapters.inputs({"own": 0.0, "wide": 0.0})) - _logits(session)).max() < 1e-5


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_blend_needs_finite_weights(value: float, hot_swap: BranchExport) -> None:
    _, adapters = _open(hot_swap)
    with pytest.raises(UsageError, match="finite weights"):
        adapters.inputs({"own": 1.0, "wide": value})


@pytest.mark.parametrize(("compute", "weight"), [("fp32", 1e39), ("fp16", 1e7)])
def test_a_blend_that_overflows_is_refused(compute: str, weight: float, branch_export: BranchFactory) -> None:
    _, adapters = _open(branch_export("llama", "nf4", adapters=ADAPTERS, compute_dtype=compute))
    with pytest.raises(UsageError, match="too large") as caught:
        adapters.inputs({"own": weight})
    assert "own" in caught.value.details["found"]


def test_an_empty_blend_and_unknown_names_are_errors_of_usage(hot_swap: BranchExport) -> None:
    _, adapters = _open(hot_swap)
    with pytest.raises(UsageError, match="finite weights"):
        adapters.inputs({})
    for asked in ("none", {"own": 0.5, "none": 0.5}):
        with pytest.raises(UsageError, match="no such adapter") as caught:
            adapters.inputs(asked)
        assert caught.value.details["found"] == "none"
        assert caught.value.details["expected"] == "narrow, own, wide"
        assert "adapter convert" in caught.value.details["remedy"]


def test_an_adapter_can_be_added_and_replaced_while_the_model_runs(hot_swap: BranchExport, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(hot_swap.output, tmp_path / "copy"))
    files = find_adapters(copy)
    elsewhere = files["wide"].rename(tmp_path / "later.onnx_adapter")
    session, adapters = _open(copy)
    assert adapters.names == ["narrow", "own"]
    own = _logits(session, adapters.inputs("own"))
    assert adapters.add(elsewhere) == "later"
    wide = _logits(session, adapters.inputs("later"))
    reference, all_of_them = _open(hot_swap)
    assert np.array_equal(wide, _logits(reference, all_of_them.inputs("wide")))
    assert adapters.add(elsewhere, "own") == "own"
    assert np.array_equal(_logits(session, adapters.inputs("own")), wide)
    assert adapters.add(files["own"], "own") == "own"
    assert np.array_equal(_logits(session, adapters.inputs("own")), own)
    assert adapters.inputs({"later": 0.5, "own": 0.5}).keys() == adapters.inputs("own").keys()


def test_adding_what_is_no_adapter_changes_nothing(hot_swap: BranchExport, tmp_path: Path) -> None:
    session, adapters = _open(hot_swap)
    own = _logits(session, adapters.inputs("own"))
    (tmp_path / "own.onnx_adapter").write_text("nothing")
    for file in (tmp_path / "own.onnx_adapter", tmp_path / "missing.onnx_adapter", tmp_path):
        with pytest.raises(AdapterError):
            adapters.add(file)
    assert adapters.names == sorted(ADAPTERS)
    assert np.array_equal(_logits(session, adapters.inputs("own")), own)


@pytest.mark.parametrize("branch", [None, "fixed"])
def test_a_graph_that_has_its_adapter_built_in_takes_no_other(branch: str | None, branch_export: BranchFactory) -> None:
    export = branch_export("llama", "nf4", branch)
    session, adapters = _open(export)
    assert adapters.names == []
    assert adapters.inputs(None) == {}
    file = export.output / "own.onnx_adapter"
    for ask in (lambda: adapters.inputs("own"), lambda: adapters.inputs({"own": 1.0}), lambda: adapters.add(file)):
        with pytest.raises(UsageError, match="takes no adapters") as caught:
            ask()
        assert "own" in caught.value.details["found"]
        assert "--branch" in caught.value.details["remedy"]
    with pytest.raises(UsageError, match="only a pooled graph"):
        adapters.row_inputs(["own", None])
    assert np.isfinite(_logits(session, adapters.row_inputs([None, None]))).all()


def test_each_row_of_a_pooled_run_is_what_the_adapter_gives_alone(pooled: BranchExport, hot_swap: BranchExport) -> None:
    session, adapters = _open(pooled)
    assert adapters.names == list(ADAPTERS)
    choice = ["wide", None, "narrow"]
    mixed = _logits(session, adapters.row_inputs(choice))
    one_by_one, separate = _open(hot_swap)
    for row, name in enumerate(choice):
        assert np.abs(mixed[row] - _logits(one_by_one, separate.inputs(name))[row]).max() < 1e-4
        assert np.abs(mixed[row] - _logits(session, adapters.inputs(name))[row]).max() < 1e-4
    nobody = _logits(session, adapters.row_inputs([None] * 3))
    assert np.array_equal(nobody, _logits(session))
    assert np.array_equal(nobody, _logits(one_by_one))


def test_a_pool_is_neither_blended_nor_added_to(pooled: BranchExport, hot_swap: BranchExport) -> None:
    _, adapters = _open(pooled)
    with pytest.raises(UsageError, match="cannot blend"):
        adapters.inputs({"own": 0.5, "wide": 0.5})
    with pytest.raises(UsageError, match="takes no adapters") as caught:
        adapters.add(find_adapters(hot_swap.output)["own"])
    assert "are in it" in caught.value.details["expected"]
    for ask in (lambda: adapters.inputs("none"), lambda: adapters.row_inputs(["own", "none"])):
        with pytest.raises(UsageError, match="no such adapter") as caught:
            ask()
        assert caught.value.details["expected"] == "own, wide, narrow"


def test_rows_of_different_adapters_need_a_pool(hot_swap: BranchExport) -> None:
    session, adapters = _open(hot_swap)
    with pytest.raises(UsageError, match="only a pooled graph"):
        adapters.row_inputs(["own", "wide"])
    assert adapters.row_inputs(["own", "own"]) is adapters.inputs("own")
    assert adapters.row_inputs([None, None]) == adapters.row_inputs([]) == {}
    assert np.isfinite(_logits(session, adapters.row_inputs(["own"] * 3))).all()


def test_a_graph_of_someone_else_has_no_adapters(hot_swap: BranchExport) -> None:
    session, _ = _open(hot_swap)
    session.manifest = None
    adapters = Adapters(session, hot_swap.output)
    assert adapters.names == []
    with pytest.raises(UsageError, match="takes no adapters"):
        adapters.inputs("own")


def test_an_adapter_that_overflows_does_not_reach_the_rows_of_others(
    checkpoint_dir: CheckpointFactory, adapter_dir: Callable[..., Path], tmp_path: Path
) -> None:
    evil = read_adapter(adapter_dir("llama"))
    updates = {name: replace(update, A=torch.full_like(update.A, 3e38)) for name, update in evil.updates.items()}
    write_adapter(replace(evil, updates=updates), tmp_path / "evil")
    named = {"good": adapter_dir("llama"), "evil": tmp_path / "evil"}
    options = {"merge": False, "branch": "pooled", "quantization": "nf4", "verify": False}
    export_onnx(checkpoint_dir("llama"), named, output=tmp_path / "out", **options)  # type: ignore[arg-type]
    session = OnnxSession(tmp_path / "out")
    adapters = Adapters(session, tmp_path / "out")
    ids = np.arange(3, 12)[None].repeat(3, axis=0)
    rows = session.forward(ids, np.ones_like(ids), None, adapters.row_inputs(["good", "evil", None]))[0]
    calm = session.forward(ids, np.ones_like(ids), None, adapters.row_inputs(["good", None, None]))[0]
    assert not np.isfinite(rows[1]).all()
    assert np.array_equal(rows[[0, 2]], calm[[0, 2]])


@pytest.mark.parametrize("wrong", [["own"], 7, {"own": "0.5"}, {"own": None}])
def test_what_is_no_adapter_is_an_error_of_usage(wrong: object, branch_export: BranchFactory) -> None:
    directory = branch_export().output
    with pytest.raises(UsageError):
        Adapters(OnnxSession(directory), directory).inputs(wrong)  # type: ignore[arg-type]
