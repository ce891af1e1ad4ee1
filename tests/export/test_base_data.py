"""An export made again with another adapter keeps the base's file, and is what it would have been without."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from safetensors.torch import load_file, save_file

from lora_deploy.errors import ParityError
from lora_deploy.export import ExportResult, export_onnx
from lora_deploy.integrity import SEAL_ENTRY, UNSEALED, check_files, seal_bytes
from lora_deploy.quantization.base import TrainingBase
from tests.commands import Command, command, tree
from tests.conftest import CheckpointFactory

__all__ = ["command"]

Adapters = Callable[..., Path]
FIXED = {"merge": False, "branch": "fixed"}
KINDS: dict[str, dict[str, Any]] = {
    "hot-swap": {"merge": False, "branch": "hot-swap"},
    "fixed": FIXED,
    "pooled": {"merge": False, "branch": "pooled"},
    "dequantized": FIXED | {"precision": "fp16"},
    "int8 adapters": FIXED | {"adapter_precision": "int8"},
}


def _export(base: Path, adapter: Any, output: Path, **options: Any) -> ExportResult:
    asked = {"quantization": "nf4", "verify": False, "overwrite": True} | options
    return export_onnx(base, adapter, output=output, **asked)


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Call it, and no weight of the base may be read any more."""

    def read(self: TrainingBase, name: str, *rest: Any) -> Any:
        raise AssertionError(f"{name} is read")

    def forbid() -> None:
        for method in ("weight", "tensor"):
            monkeypatch.setattr(TrainingBase, method, read)

    return forbid


@pytest.mark.parametrize("method", ["nf4", "int8", "none"])
@pytest.mark.parametrize("kind", KINDS)
def test_another_adapter_reads_no_weight(
    kind: str,
    method: str,
    checkpoint_dir: CheckpointFactory,
    adapter_dir: Adapters,
    unread: Callable[[], None],
    tmp_path: Path,
) -> None:
    base, first, second = checkpoint_dir("llama"), adapter_dir("llama", seed=1), adapter_dir("llama", seed=2, r=5)
    adapters: list[Any] = [first, second] if kind != "pooled" else [{"a": first}, {"a": first, "b": second}]
    options = KINDS[kind] | {"quantization": method}
    fresh = _export(base, adapters[1], tmp_path / "fresh", **options)
    older = _export(base, adapters[0], tmp_path / "out", **options)
    files = {file.name: file.stat().st_ino for file in older.output.glob("*.onnx.data")}
    unread()
    again = _export(base, adapters[1], tmp_path / "out", **options)
    assert (fresh.kept_base, older.kept_base, again.kept_base) == (False, False, True)
    assert tree(again.output) == tree(fresh.output)
    kept = [file for file in again.output.glob("*.onnx.data") if files.get(file.name) == file.stat().st_ino]
    assert len(kept) == 1
    check_files(again.output)


def test_the_gate_looks_at_what_was_kept(
    checkpoint_dir: CheckpointFactory, adapter_dir: Adapters, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, first, second = checkpoint_dir("llama"), adapter_dir("llama", seed=1), adapter_dir("llama", seed=2)
    _export(base, first, tmp_path / "out", **FIXED)
    result = _export(base, second, tmp_path / "out", **FIXED, verify=True)
    assert result.kept_base
    assert result.report is not None
    assert result.report.passed

    # Somebody has the older file in hand, and changes a code after it was looked at: the check of the whole finds it.
    import lora_deploy.export.base_data as module

    linked = module._link_whole
    graph = onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False).graph
    codes = next(tensor for tensor in graph.initializer if tensor.name.endswith("up_proj.weight.codes"))
    offset = next(int(entry.value) for entry in codes.external_data if entry.key == "offset")

    def change(file: Path, staging: Path, sha256: str) -> bool:
        assert linked(file, staging, sha256)
        content = bytearray((staging / file.name).read_bytes())
        content[offset] ^= 0x77
        (staging / file.name).unlink()
        (staging / file.name).write_bytes(content)
        return True

    monkeypatch.setattr(module, "_link_whole", change)
    before = tree(tmp_path / "out")
    with pytest.raises(ParityError):
        _export(base, first, tmp_path / "out", **FIXED, verify=True)
    assert tree(tmp_path / "out") == before


def _other_weight(base: Path) -> None:
    file = base / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] += 1
    save_file(tensors, file, metadata={"format": "pt"})


def _other_config(base: Path) -> None:
    file = base / "config.json"
    config = json.loads(file.read_text())
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 777.0}
    file.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "options"),
    [
        (_other_weight, {}),
        (_other_config, {}),
        (None, {"quantization": "fp4"}),
        (None, {"double_quant": False}),
        (None, {"compute_dtype": "fp16"}),
        (None, {"precision": "fp32"}),
        (None, {"expand": True}),
    ],
)
@pytest.mark.parametrize("kind", ["hot-swap", pytest.param("fixed", marks=pytest.mark.slow)])
def test_another_base_is_written_anew(
    kind: str,
    change: Callable[[Path], None] | None,
    options: dict[str, Any],
    checkpoint_dir: CheckpointFactory,
    adapter_dir: Adapters,
    tmp_path: Path,
) -> None:
    base, adapter = tmp_path / "base", adapter_dir("llama")
    shutil.copytree(checkpoint_dir("llama"), base)
    _export(base, adapter, tmp_path / "out", **KINDS[kind])
    if change is not None:
        change(base)
    again = _export(base, adapter, tmp_path / "out", **KINDS[kind] | options)
    # The rotary tables, which another configuration changes, stand beside the adapter where that is built in.
    assert again.kept_base == (change is _other_config and kind == "fixed")
    fresh = _export(base, adapter, tmp_path / "fresh", **KINDS[kind] | options)
    assert tree(again.output) == tree(fresh.output)


def test_parameters_that_were_trained_whole_are_of_the_base_file(
    checkpoint_dir: CheckpointFactory, adapter_dir: Adapters, tmp_path: Path
) -> None:
    base = checkpoint_dir("llama")
    places = [adapter_dir("llama", seed=seed, modules_to_save=["model.norm"]) for seed in (1, 2)]
    kept = [_export(base, place, tmp_path / "out", **FIXED).kept_base for place in (places[0], places[0], places[1])]
    assert kept == [False, True, False]


def test_what_is_merged_is_never_kept(checkpoint_dir: CheckpointFactory, adapter_dir: Adapters, tmp_path: Path) -> None:
    base, adapter = checkpoint_dir("llama"), adapter_dir("llama")
    assert not any(_export(base, adapter, tmp_path / "out").kept_base for _ in range(2))


@pytest.mark.parametrize("harm", ["a flipped bit", "no file", "a link", "a graph that is damaged"])
def test_a_damaged_file_is_not_kept(
    harm: str, checkpoint_dir: CheckpointFactory, adapter_dir: Adapters, tmp_path: Path
) -> None:
    base, adapter, output = checkpoint_dir("llama"), adapter_dir("llama"), tmp_path / "out"
    _export(base, adapter, output, **KINDS["hot-swap"])
    whole = tree(output)
    (data,) = output.glob("*.onnx.data")
    if harm == "a flipped bit":
        content = bytearray(data.read_bytes())
        content[100] ^= 1
        data.write_bytes(content)
    elif harm == "no file":
        data.unlink()
    elif harm == "a link":
        data.rename(tmp_path / "elsewhere")
        data.symlink_to(tmp_path / "elsewhere")
    else:
        graph = (output / "model.onnx").read_bytes()
        (output / "model.onnx").write_bytes(graph.replace(b"fp32", b"fp16", 1))
    assert not _export(base, adapter, output, **KINDS["hot-swap"]).kept_base
    assert tree(output) == whole


def _elsewhere(tensor: onnx.TensorProto) -> None:
    next(entry for entry in tensor.external_data if entry.key == "location").value = "config.json"
    next(entry for entry in tensor.external_data if entry.key == "offset").value = "0"


def _reshaped(tensor: onnx.TensorProto) -> None:
    tensor.dims[:] = [1, *tensor.dims]


@pytest.mark.parametrize("lie", [_elsewhere, _reshaped, lambda tensor: setattr(tensor, "name", "other")])
def test_an_older_graph_that_lies_is_not_believed(
    lie: Callable[[Any], None], checkpoint_dir: CheckpointFactory, adapter_dir: Adapters, tmp_path: Path
) -> None:
    base, adapter, output = checkpoint_dir("llama"), adapter_dir("llama"), tmp_path / "out"
    _export(base, adapter, output, **FIXED)
    whole, file = tree(output), output / "model.onnx"
    model = onnx.load(file, load_external_data=False)
    lie(next(tensor for tensor in model.graph.initializer if tensor.name.endswith("up_proj.weight.codes")))
    next(entry for entry in model.metadata_props if entry.key == SEAL_ENTRY).value = UNSEALED
    file.write_bytes(seal_bytes("model.onnx", model.SerializeToString()))
    assert not _export(base, adapter, output, **FIXED).kept_base
    assert tree(output) == whole


def test_without_links_it_is_a_copy(
    checkpoint_dir: CheckpointFactory, adapter_dir: Adapters, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter, output = checkpoint_dir("llama"), adapter_dir("llama"), tmp_path / "out"
    _export(base, adapter, output, **KINDS["hot-swap"])
    whole = tree(output)

    def link(*_: Any, **__: Any) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", link)
    assert _export(base, adapter, output, **KINDS["hot-swap"]).kept_base
    assert tree(output) == whole


def test_the_command_says_so(
    checkpoint_dir: CheckpointFactory, adapter_dir: Adapters, tmp_path: Path, command: Command
) -> None:
    asked = ["export", "--branch", "--model", checkpoint_dir("llama"), "--adapter", adapter_dir("llama")]
    asked += ["--output", tmp_path / "out", "--quantization", "nf4", "--no-verify", "--overwrite"]
    first, again = (command(*asked) for _ in range(2))
    assert "which are the same" not in first.out
    assert "base: the weights of the export that was replaced, which are the same" in again.out
