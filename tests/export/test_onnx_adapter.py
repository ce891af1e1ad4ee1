"""`.onnx_adapter` files for an export that is there, and what an adapter is said to change."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
from safetensors.torch import load_file, save_file

from lora_deploy.adapter import TrainingRecord, read_adapter, write_adapter
from lora_deploy.errors import AdapterError, InputError, OutputError, UsageError
from lora_deploy.export.inspect import describe_adapter
from lora_deploy.export.onnx_adapter import convert_adapter
from lora_deploy.integrity import find_adapters
from lora_deploy.manifest import Manifest
from lora_deploy.quantization import QuantizationScheme
from lora_deploy.run.adapter_files import read_tensors
from tests.commands import tree
from tests.conftest import random_adapter, tiny_model
from tests.export.conftest import SHORT, BranchExport, BranchFactory


@pytest.fixture
def made(branch_export: BranchFactory, tmp_path: Path) -> BranchExport:
    """An export that the test may damage, and a copy of its adapter."""
    export = branch_export("llama", "nf4")
    output = Path(shutil.copytree(export.output, tmp_path / "out"))
    adapter = Path(shutil.copytree(export.adapters["own"], tmp_path / "own"))
    result = export.result.__class__(output, export.result.bytes, None)
    return BranchExport(export.base_dir, export.scheme, {"own": adapter}, result)


def _record(made: BranchExport, **changes: Any) -> None:
    values = {"base_model": "b", "quantization": made.scheme, "base_sha256": made.base.sha256()}
    TrainingRecord(**(values | changes)).save(made.adapters["own"])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("compute", ["fp32", "fp16"])
def test_a_converted_adapter_is_the_file_that_export_writes_byte_for_byte(
    family: str, compute: str, branch_export: BranchFactory, tmp_path: Path
) -> None:
    export = branch_export(family, "nf4", compute_dtype=compute)
    output = Path(shutil.copytree(export.output, tmp_path / "out"))
    own = find_adapters(output)["own"]
    expected = own.read_bytes()
    shutil.rmtree(own.parent)
    assert convert_adapter(export.adapters["own"], output) == own
    assert own.read_bytes() == expected
    before = tree(output)
    second = convert_adapter(export.adapters["own"], output, "again.2")
    assert second.read_bytes() == expected
    after = tree(output)
    assert after.pop("adapters/again.2.onnx_adapter") == before["adapters/own.onnx_adapter"]
    assert after == before  # nothing else of the export has changed


def test_an_adapter_with_its_record_of_the_same_base_is_taken(made: BranchExport) -> None:
    _record(made)
    assert convert_adapter(made.adapters["own"], made.output, "recorded").is_file()


def test_an_adapter_of_another_base_is_refused(made: BranchExport) -> None:
    _record(made, base_sha256="0" * 64)
    before = tree(made.output)
    with pytest.raises(AdapterError, match="another base") as caught:
        convert_adapter(made.adapters["own"], made.output, "new")
    assert "0000" in caught.value.details["found"]
    assert tree(made.output) == before


@pytest.mark.parametrize("other", [{"method": "fp4"}, {"method": "int8"}, {"double_quant": False}], ids=str)
def test_an_adapter_of_another_quantization_is_refused(other: dict[str, Any], made: BranchExport) -> None:
    _record(made, quantization=QuantizationScheme(**({"method": "nf4"} | other)))
    before = tree(made.output)
    with pytest.raises(AdapterError, match="another quantization"):
        convert_adapter(made.adapters["own"], made.output, "new")
    assert tree(made.output) == before


def _rename(made: BranchExport) -> str:
    file = made.adapters["own"] / "adapter_model.safetensors"
    tensors = load_file(file)
    renamed = {key.replace("layers.1.mlp.up_proj", "layers.7.mlp.up_proj"): value for key, value in tensors.items()}
    save_file(renamed, file, metadata={"format": "pt"})
    return "model.layers.7.mlp.up_proj"


def _widen(made: BranchExport) -> str:
    wide = tiny_model("llama", hidden_size=32, head_dim=8, **SHORT["llama"])
    write_adapter(random_adapter(wide), made.adapters["own"])
    return "model.layers.0"


def _whole(made: BranchExport) -> str:
    whole = random_adapter(tiny_model("llama", **SHORT["llama"]), modules_to_save=["lm_head"])
    shutil.rmtree(made.adapters["own"])
    write_adapter(whole, made.adapters["own"])
    return "lm_head"


def _poison(made: BranchExport) -> str:
    file = made.adapters["own"] / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(key for key in tensors if "layers.1" in key)
    tensors[name].view(-1)[3] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    return "layers.1"


@pytest.mark.parametrize("change", [_rename, _widen, _whole, _poison])
def test_what_the_graph_has_no_place_for_is_refused_by_name(
    change: Callable[[BranchExport], str], made: BranchExport
) -> None:
    name = change(made)
    before = tree(made.output)
    with pytest.raises(AdapterError) as caught:
        convert_adapter(made.adapters["own"], made.output, "new")
    assert name in caught.value.details["tensor"]
    assert tree(made.output) == before


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../up", "a/b", "/a", "-a", ".a", "a b", "a\n", "ä", "a" * 201, "a\0b"]
)
def test_what_cannot_be_a_name_is_refused(name: str, made: BranchExport) -> None:
    before = tree(made.output.parent)
    with pytest.raises(UsageError, match="cannot be the name") as caught:
        convert_adapter(made.adapters["own"], made.output, name)
    assert "--name" in caught.value.details["remedy"]
    assert tree(made.output.parent) == before


def test_the_longest_name_can_be_written(made: BranchExport) -> None:
    assert convert_adapter(made.adapters["own"], made.output, "a" * 200).is_file()


def test_an_adapter_that_is_there_is_kept_unless_overwrite_is_said(made: BranchExport) -> None:
    file = find_adapters(made.output)["own"]
    expected = file.read_bytes()
    file.write_bytes(b"old")
    with pytest.raises(OutputError, match="an adapter of this name") as caught:
        convert_adapter(made.adapters["own"], made.output)
    assert "--overwrite" in caught.value.details["remedy"]
    assert file.read_bytes() == b"old"
    convert_adapter(made.adapters["own"], made.output, overwrite=True)
    assert file.read_bytes() == expected


@pytest.mark.parametrize("error", [RuntimeError("disk full"), OSError(28, "disk full"), KeyboardInterrupt()])
@pytest.mark.parametrize("first", [False, True])
def test_a_failed_write_leaves_nothing(
    error: BaseException, first: bool, made: BranchExport, monkeypatch: pytest.MonkeyPatch
) -> None:
    if first:
        shutil.rmtree(made.output / "adapters")
    real = onnxruntime.AdapterFormat

    class Full:
        def __getattr__(self, name: str) -> Any:
            return getattr(self._real, name)

        def __init__(self) -> None:
            self._real = real()

        def export_adapter(self, file: str) -> None:
            self._real.export_adapter(file)
            os.truncate(file, 100)
            raise error

    monkeypatch.setattr(onnxruntime, "AdapterFormat", Full)
    before = tree(made.output)
    expected = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else OutputError
    with pytest.raises(expected):
        convert_adapter(made.adapters["own"], made.output, "own", overwrite=True)
    assert tree(made.output) == before


def test_a_file_in_the_place_of_the_directory_is_an_error_of_output(made: BranchExport) -> None:
    shutil.rmtree(made.output / "adapters")
    (made.output / "adapters").write_text("years of work")
    with pytest.raises(OutputError, match="could not be written"):
        convert_adapter(made.adapters["own"], made.output)
    assert (made.output / "adapters").read_text() == "years of work"


@pytest.mark.parametrize("branch", [None, "fixed", "pooled"])
def test_an_export_without_slots_takes_no_adapter(branch: str | None, branch_export: BranchFactory) -> None:
    export = branch_export("llama", "nf4", branch)
    with pytest.raises(UsageError, match="takes no adapters") as caught:
        convert_adapter(export.adapters["own"], export.output, "new")
    assert (branch or "merged") in caught.value.details["found"]


def test_what_is_no_export_or_no_adapter_is_named(made: BranchExport, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no exported model"):
        convert_adapter(made.adapters["own"], tmp_path / "none")
    with pytest.raises(InputError) as caught:
        convert_adapter(tmp_path / "none", made.output)
    assert str(tmp_path / "none") in caught.value.details["file"]


@pytest.mark.parametrize("options", [{}, {"r": 3, "use_rslora": True}, {"r": 6, "target_modules": ["q_proj"]}], ids=str)
def test_inspect_gives_the_norms_of_the_dense_updates(options: dict[str, Any], tmp_path: Path) -> None:
    write_adapter(random_adapter(tiny_model("llama"), **options), tmp_path)
    description, adapter = describe_adapter(tmp_path), read_adapter(tmp_path)
    assert {update.name for update in description.updates} == set(adapter.updates)
    for update in description.updates:
        own = adapter.updates[update.name]
        delta = own.scaling * own.B.double() @ own.A.double()
        assert update.norm_delta == pytest.approx(float(delta.norm()), rel=1e-5)
        assert (update.outputs, update.inputs) == delta.shape
        assert update.rank == options.get("r", 4)
        assert update.scaling == own.scaling
    assert description.parameters == sum(own.A.numel() + own.B.numel() for own in adapter.updates.values())
    assert description.base == "not recorded"
    assert "MB" in description.summary()


def test_inspect_tells_of_a_file_what_it_tells_of_the_directory(made: BranchExport) -> None:
    file = find_adapters(made.output)["own"]
    of_file, of_directory = describe_adapter(file), describe_adapter(made.adapters["own"])
    assert of_file.model_version == Manifest.load(made.output).fingerprint
    assert of_file.bytes == file.stat().st_size
    for found in (of_file, of_directory):
        assert found.table().row_count > 0
    squares = [sum(update.norm_delta**2 for update in found.updates) for found in (of_file, of_directory)]
    assert squares[0] == pytest.approx(squares[1], rel=1e-5)


def test_inspect_knows_what_was_trained_whole_and_the_recorded_base(made: BranchExport) -> None:
    _whole(made)
    _record(made)
    description = describe_adapter(made.adapters["own"])
    assert description.whole == ["lm_head.weight"]
    assert "lm_head" in description.summary()
    assert description.base.startswith("b in ")


@pytest.mark.parametrize("damage", ["only A", "ranks that differ", "one dimension"])
def test_inspect_names_an_update_that_is_not_whole(damage: str, made: BranchExport, tmp_path: Path) -> None:
    version, tensors = read_tensors(find_adapters(made.output)["own"])
    name = next(key for key in tensors if key.endswith("lora_B"))
    if damage == "only A":
        del tensors[name]
    else:
        tensors[name] = (tensors[name][:-1] if damage == "ranks that differ" else tensors[name][0]).copy()
    container = onnxruntime.AdapterFormat()
    container.set_adapter_version(1)
    container.set_model_version(version)
    values = {key: onnxruntime.OrtValue.ortvalue_from_numpy(array) for key, array in tensors.items()}
    container.set_parameters(values)
    container.export_adapter(str(tmp_path / "a.onnx_adapter"))
    with pytest.raises(AdapterError, match="not whole") as caught:
        describe_adapter(tmp_path / "a.onnx_adapter")
    assert caught.value.details["tensor"] == name.removesuffix("/lora_B")


@pytest.mark.parametrize("name", ["none", "none.onnx_adapter", "text.txt"])
def test_inspect_names_what_is_neither(name: str, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("nothing")
    with pytest.raises(InputError) as caught:
        describe_adapter(tmp_path / name)
    assert str(tmp_path / name) in caught.value.details["file"]
