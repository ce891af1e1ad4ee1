"""What an export leaves on disk: the same bytes each time, whole, and readable at every moment."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from lora_deploy.adapter import read_adapter
from lora_deploy.errors import OutputError
from lora_deploy.export import commit as commit_module
from lora_deploy.export import export_onnx
from lora_deploy.export.commit import commit, staging_directory
from lora_deploy.export.merge import hash_adapter
from lora_deploy.export.writer import write_data, write_model
from lora_deploy.quantization.base import TrainingBase
from lora_deploy.run import OnnxSession
from tests.commands import tree
from tests.conftest import CheckpointFactory, token_ids
from tests.export.conftest import ExportFactory

FAMILIES = ("llama", "gpt2")


def _logits(directory: Path) -> np.ndarray:
    ids = token_ids().numpy()
    return OnnxSession(directory).forward(ids, np.ones_like(ids))[0]


def _metadata(directory: Path) -> dict[str, str]:
    return dict(ir.load(directory / "model.onnx").metadata_props)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_input_gives_the_same_bytes_in_every_file(
    family: str, tiny_export: ExportFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To another directory, with another temporary directory, from another working directory."""
    base, adapter, first = tiny_export(family)
    temporary = tmp_path / "a-temporary-place"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    monkeypatch.chdir(tmp_path)
    second = export_onnx(base, adapter, output="another/name", quantization="nf4")
    assert tree(second.output) == tree(first.output)
    for directory in (temporary, second.output.resolve(), first.output):
        for file in first.output.iterdir():
            assert str(directory).encode() not in file.read_bytes()
    assert not any(temporary.iterdir())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_data_file_is_named_after_its_content(family: str, tiny_export: ExportFactory) -> None:
    _, _, result = tiny_export(family)
    (data,) = result.output.glob("*.data")
    digest = hashlib.sha256(data.read_bytes()).hexdigest()
    assert data.name == f"model-{digest[:12]}.onnx.data"
    assert _metadata(result.output)["lora_deploy.data_sha256"] == digest
    assert result.bytes == data.stat().st_size + (result.output / "model.onnx").stat().st_size


def test_the_model_says_what_it_was_made_of(tiny_export: ExportFactory) -> None:
    base, adapter, result = tiny_export("llama", "nf4", precision="fp16")
    entries = _metadata(result.output)
    assert {name.removeprefix("lora_deploy.") for name in entries} == {
        "adapters",
        "base_sha256",
        "codes_sha256",
        "compute_dtype",
        "data_sha256",
        "files",
        "graph",
        "mode",
        "model_sha256",
        "precision",
        "provider",
        "quantization",
        "versions",
    }
    (described,) = json.loads(entries["lora_deploy.adapters"]).values()
    assert set(described) == {"sha256", "config"}
    assert described["sha256"] == hash_adapter(read_adapter(adapter))
    assert described["config"]["lora_alpha"] == 10
    assert entries["lora_deploy.base_sha256"] == TrainingBase(base).sha256()
    assert (entries["lora_deploy.mode"], entries["lora_deploy.precision"]) == ("merge", "fp16")
    assert entries["lora_deploy.provider"] == "cpu"
    assert entries["lora_deploy.graph"] == "mobius"
    assert json.loads(entries["lora_deploy.quantization"])["method"] == "nf4"
    assert json.loads(entries["lora_deploy.versions"])["mobius-onnx"] == "0.1.0"


def test_an_export_of_the_base_alone_names_no_adapter(checkpoint_dir: CheckpointFactory, tmp_path: Path) -> None:
    result = export_onnx(checkpoint_dir("llama"), output=tmp_path / "out", verify=False)
    assert not [name for name in _metadata(result.output) if "adapter" in name]


@pytest.mark.parametrize("family", FAMILIES)
def test_small_tensors_are_in_the_model_and_large_ones_aligned_in_the_data(
    family: str, tiny_export: ExportFactory
) -> None:
    """onnxruntime refuses a graph whose shape constants are external."""
    _, _, result = tiny_export(family)
    (data,) = result.output.glob("*.data")
    model = onnx.load(result.output / "model.onnx", load_external_data=False)
    external = {tensor.name: tensor for tensor in model.graph.initializer if tensor.data_location}
    inline = {tensor.name: tensor for tensor in model.graph.initializer if not tensor.data_location}
    assert external
    assert inline
    spans = []
    for tensor in external.values():
        entry = {pair.key: pair.value for pair in tensor.external_data}
        size = np.prod(tensor.dims) * np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)).itemsize
        assert entry["location"] == data.name
        assert int(entry["length"]) == size >= 1024
        assert int(entry["offset"]) % 4096 == 0
        spans.append((int(entry["offset"]), int(entry["offset"]) + size))
    assert all(before[1] <= after[0] for before, after in zip(sorted(spans), sorted(spans)[1:], strict=False))
    assert all(len(tensor.SerializeToString()) < 1024 + 200 for tensor in inline.values())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_onnx_finds_nothing_wrong_with_the_model(family: str, precision: str, tiny_export: ExportFactory) -> None:
    _, _, result = tiny_export(family, "nf4", precision=precision)
    onnx.checker.check_model(str(result.output / "model.onnx"), full_check=True)


def test_every_file_is_a_regular_one_with_one_link_and_usual_rights(tiny_export: ExportFactory, tmp_path: Path) -> None:
    """onnxruntime refuses external data behind links; a staging directory's rights must not reach the output."""
    _, _, result = tiny_export("llama")
    usual = tmp_path / "usual"
    usual.mkdir()
    (usual / "file").touch()
    for file in result.output.iterdir():
        status = os.lstat(file)
        assert stat.S_ISREG(status.st_mode)
        assert status.st_nlink == 1
        assert status.st_mode == os.lstat(usual / "file").st_mode
    assert os.lstat(result.output).st_mode == os.lstat(usual).st_mode


def test_overwriting_with_another_adapter_leaves_one_data_file_and_the_new_function(
    checkpoint_dir: CheckpointFactory, adapter_dir: Callable[..., Path], tmp_path: Path
) -> None:
    base, output = checkpoint_dir("llama"), tmp_path / "out"
    export_onnx(base, adapter_dir("llama"), output=output, quantization="nf4", verify=False)
    old, (old_data,) = _logits(output), output.glob("*.data")
    (output / "notes.txt").write_text("mine")
    export_onnx(base, adapter_dir("llama", r=2), output=output, quantization="nf4", overwrite=True, verify=False)
    (data,) = output.glob("*.data")
    assert data.name != old_data.name
    assert np.abs(_logits(output) - old).max() > 0.1
    assert (output / "notes.txt").read_text() == "mine"
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


@pytest.mark.parametrize("exchange", [True, False])
def test_files_of_the_users_stay_in_an_export_that_is_replaced(
    exchange: bool,
    checkpoint_dir: CheckpointFactory,
    adapter_dir: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Links and folders as they are; what an export owns goes. Also where directories cannot change places."""
    base, output = checkpoint_dir("llama"), tmp_path / "out"
    again = {"output": output, "quantization": "nf4", "verify": False}
    export_onnx(base, {"a": adapter_dir("llama")}, branch="hot-swap", merge=False, **again)
    (output / "notes").mkdir()
    (output / "notes" / "one.txt").write_text("mine")
    (output / "link").symlink_to("notes/one.txt")
    (output / "adapters" / "of-mine.txt").write_text("mine too")
    (output / "generation_config.json").write_text("{}")
    output.chmod(0o750)
    if not exchange:
        monkeypatch.setattr(commit_module, "exchange", lambda first, second: False)
    result = export_onnx(base, adapter_dir("llama", r=2), overwrite=True, **again)
    export_onnx(base, adapter_dir("llama", r=2), **{**again, "output": tmp_path / "new"})
    new, found = tree(tmp_path / "new"), tree(result.output)
    users = {"notes", "notes/one.txt", "link", "adapters", "adapters/of-mine.txt"}
    assert {name: value for name, value in found.items() if name not in users} == new
    assert set(found) == set(new) | users
    assert os.readlink(output / "link") == "notes/one.txt"
    assert (output / "notes" / "one.txt").read_text() == "mine"
    assert (output / "adapters" / "of-mine.txt").read_text() == "mine too"
    assert stat.S_IMODE(output.stat().st_mode) == 0o750
    assert {path.name for path in tmp_path.iterdir()} == {"out", "new"}


def test_below_somebodys_feet_the_directory_itself_stays(
    checkpoint_dir: CheckpointFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--output .` would leave the shell in a directory that is gone."""
    output = tmp_path / "out"
    output.mkdir()
    monkeypatch.chdir(output)
    inode = output.stat().st_ino
    base = checkpoint_dir("llama")
    export_onnx(base, output=".", quantization="nf4", verify=False)
    export_onnx(base, output=".", quantization="fp4", verify=False, overwrite=True)
    assert output.stat().st_ino == inode
    assert len(list(output.glob("*.data"))) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


@pytest.mark.parametrize("there", ["mount point", "parent that is not ours"])
def test_where_nothing_can_be_renamed_the_staging_is_inside(
    there: str, checkpoint_dir: CheckpointFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    output.mkdir()
    base, seen = checkpoint_dir("llama"), set()
    if there == "mount point":
        monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == output)
    else:
        real = os.access
        monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path and real(path, mode))
    real_commit = commit

    def look(staging: Path, place: Path) -> None:
        seen.update(path.name for path in output.iterdir())
        seen.update(path.name for path in tmp_path.iterdir())
        real_commit(staging, place)

    monkeypatch.setattr("lora_deploy.export.export.commit", look)
    for quantization in ("nf4", "fp4"):
        export_onnx(base, output=output, quantization=quantization, verify=False, overwrite=True)
    assert {".lora-deploy.lock", ".lora-deploy.staging"} < seen
    assert not [name for name in seen if name.startswith(".out")]
    assert not list(output.glob(".*"))
    assert len(list(output.glob("*.data"))) == 1


def test_everything_is_synced_before_it_is_renamed_and_the_directory_after(
    checkpoint_dir: CheckpointFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[tuple[str, str]] = []
    real_sync, real_rename = commit_module.sync, Path.rename

    def sync(path: Path) -> None:
        done.append(("sync", str(path.relative_to(tmp_path))))
        real_sync(path)

    def rename(self: Path, target: Path) -> Path:
        if self.name.endswith(".staging"):
            done.append(("rename", target.name))
        return real_rename(self, target)

    monkeypatch.setattr(commit_module, "sync", sync)
    monkeypatch.setattr(Path, "rename", rename)
    result = export_onnx(checkpoint_dir("llama"), output=tmp_path / "out", quantization="nf4", verify=False)
    staged = {f".out.staging/{path.name}" for path in result.output.iterdir()}
    assert {name for kind, name in done[:-2]} == {*staged, ".out.staging"}
    assert done[-3:] == [("sync", ".out.staging"), ("rename", "out"), ("sync", ".")]


def _graph(**shapes: tuple[int, ...]) -> ir.Model:
    values = [ir.val(name, dtype=ir.DataType.FLOAT, shape=shape) for name, shape in shapes.items()]
    graph = ir.Graph([], [], nodes=[], initializers=values, name="graph", opset_imports={"": 21})
    return ir.Model(graph, ir_version=10)


def test_what_is_written_is_what_is_read_and_every_byte_is_counted(tmp_path: Path) -> None:
    """Also a transposed view, a scalar, and a tensor of exactly the size from which on it is external."""
    tensors = {
        "turned": torch.randn(40, 30).t().contiguous(),
        "scalar": torch.tensor(3.0),
        "edge": torch.randn(256),
        "below": torch.randn(255),
    }
    model = _graph(**{name: tuple(values.shape) for name, values in tensors.items()})
    counts: list[int] = []
    sha256 = write_data(model, tensors.items(), tmp_path, counts.append)
    write_model(model, tmp_path)
    assert sum(counts) == 4 * (1200 + 256)
    (data,) = tmp_path.glob("*.data")
    assert hashlib.sha256(data.read_bytes()).hexdigest() == sha256
    for name, value in ir.load(tmp_path / "model.onnx").graph.initializers.items():
        assert value.const_value is not None
        assert np.array_equal(value.const_value.numpy(), tensors[name].numpy())
        assert isinstance(value.const_value, ir.ExternalTensor) == (name in ("turned", "edge"))


def test_an_initializer_may_come_in_parts(tmp_path: Path) -> None:
    whole = {"large": torch.randn(40, 30), "small": torch.randn(5, 3), "next": torch.randn(300)}
    model = _graph(**{name: tuple(values.shape) for name, values in whole.items()})
    parts = [(name, part) for name, values in whole.items() for part in values.split(7)]
    sha256 = write_data(model, parts, tmp_path)
    assert sha256 == write_data(
        _graph(**{name: tuple(one.shape) for name, one in whole.items()}), whole.items(), tmp_path
    )
    for name, values in whole.items():
        assert np.array_equal(model.graph.initializers[name].const_value.numpy(), values.numpy())  # type: ignore[union-attr]


def test_an_inline_tensor_is_a_copy_of_its_own(tmp_path: Path) -> None:
    """The stream may hand out views of one buffer that it fills anew."""
    buffer = torch.ones(8)
    model = _graph(first=(8,), second=(8,))

    def stream() -> object:
        yield "first", buffer
        buffer.fill_(2)
        yield "second", buffer

    write_data(model, stream(), tmp_path)  # type: ignore[arg-type]
    values = model.graph.initializers
    assert values["first"].const_value.numpy().tolist() == [1.0] * 8  # type: ignore[union-attr]
    assert values["second"].const_value.numpy().tolist() == [2.0] * 8  # type: ignore[union-attr]


def test_a_failed_commit_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "config.json").write_text("old")
    (output / "model.onnx").mkdir()  # cannot be replaced by a file
    before = tree(tmp_path)
    monkeypatch.setattr(commit_module, "exchange", lambda first, second: False)
    with staging_directory(output) as staging:
        for name in ("config.json", "new.json", "model-0123.onnx.data", "model.onnx", "adapters/a.onnx_adapter"):
            (staging / name).parent.mkdir(exist_ok=True)
            (staging / name).write_text("new")
        with pytest.raises(OutputError, match="could not be written"):
            commit(staging, output)
    assert {name: value for name, value in tree(tmp_path).items() if name != "out/adapters"} == before
