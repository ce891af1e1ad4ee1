"""`verify` knows every file of an export: none may be changed, be missing, or come from another export."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir
import pytest

from lora_deploy.errors import AdapterError
from lora_deploy.export.onnx_adapter import convert_adapter
from lora_deploy.integrity import FILES_ENTRY, check_files, hash_file, recorded_files, seal_bytes, seal_of
from lora_deploy.manifest import read_metadata
from lora_deploy.run.adapter_seal import check_sealed
from tests.commands import Command, assert_one_message, command
from tests.export.conftest import SHORT, BranchExport, BranchFactory, branch_export
from tests.sealed import reseal, save_graph

__all__ = ["branch_export", "command"]

TWO = {"one": {}, "two": {"seed": 3}}


@pytest.fixture
def made(branch_export: BranchFactory, tmp_path: Path) -> Path:
    """A hot-swap export with two adapters and its report."""
    return Path(shutil.copytree(branch_export("llama", "nf4", adapters=TWO, verify=True).output, tmp_path / "out"))


@pytest.fixture
def other(branch_export: BranchFactory) -> BranchExport:
    """One of another base."""
    return branch_export("llama", "nf4", adapters=TWO, base=SHORT["llama"] | {"initializer_range": 0.3}, verify=True)


def test_the_graph_records_every_other_file(made: Path) -> None:
    recorded = recorded_files(read_metadata(made), made / "model.onnx")
    files = {path.relative_to(made).as_posix(): path for path in made.rglob("*") if path.is_file()}
    assert set(files) - set(recorded) == {"model.onnx", "parity.json", "report.html"}
    assert recorded == {name: hash_file(files[name]) for name in recorded}
    assert check_files(made) == read_metadata(made)


def _data(directory: Path) -> Path:
    (data,) = directory.glob("*.data")
    return data


# What somebody did to the export, and what the message names.
CHANGES: dict[str, tuple[Callable[[Path, Path], object], list[str]]] = {
    "weights of another export": (
        lambda own, other: shutil.copyfile(_data(other), _data(own)),
        ["changed after the export", ".onnx.data", "sha256"],
    ),
    "a graph of another export": (
        lambda own, other: shutil.copyfile(other / "model.onnx", own / "model.onnx"),
        ["missing", ".onnx.data", "export again"],
    ),
    "the report of another export": (
        lambda own, other: shutil.copyfile(other / "parity.json", own / "parity.json"),
        ["the parity report is of another export", "parity.json", "model_sha256"],
    ),
    "a report that says what it did not": (
        lambda own, other: (own / "parity.json").write_text(
            re.sub('"mean_kl": [^,]*', '"mean_kl": 0.0', (own / "parity.json").read_text())
        ),
        ["the parity report is damaged", "parity.json"],
    ),
    "the page of another export": (
        lambda own, other: shutil.copyfile(other / "report.html", own / "report.html"),
        ["the page of the parity report is of another export", "report.html", "model_sha256"],
    ),
    "a page that says what it did not": (
        lambda own, other: (own / "report.html").write_text(
            (own / "report.html").read_text().replace("at most", "about", 1)
        ),
        ["the page of the parity report is damaged", "report.html"],
    ),
    "an adapter of another base": (
        lambda own, other: shutil.copyfile(other / "adapters/one.onnx_adapter", own / "adapters/one.onnx_adapter"),
        ["another base", "one.onnx_adapter"],
    ),
    "another adapter of another base": (
        lambda own, other: shutil.copyfile(other / "adapters/one.onnx_adapter", own / "adapters/new.onnx_adapter"),
        ["another base", "new.onnx_adapter"],
    ),
    "an adapter that is no file of ours": (
        lambda own, other: (own / "adapters/new.onnx_adapter").write_bytes(b"nothing"),
        ["damaged", "new.onnx_adapter", "adapter convert"],
    ),
    "another configuration": (
        lambda own, other: (own / "config.json").write_text("{}"),
        ["changed after the export", "config.json"],
    ),
    "tokens that were added": (
        lambda own, other: (own / "added_tokens.json").write_text('{"hello": 3}'),
        ["not of this export", "added_tokens.json", "remove it"],
    ),
    "a file that is gone": (lambda own, other: (own / "genai_config.json").unlink(), ["missing", "genai_config.json"]),
    "a record of files elsewhere": (
        lambda own, other: _record(own, {"../../secret": "0" * 64}),
        ["what the model says of itself", "lora_deploy.files", "model.onnx"],
    ),
    "a record that is no digest": (
        lambda own, other: _record(own, {"config.json": "0"}),
        ["what the model says of itself", "lora_deploy.files", "model.onnx"],
    ),
}


def _record(directory: Path, files: dict[str, str]) -> None:
    model = ir.load(directory / "model.onnx")
    save_graph(model, directory)
    unsealed = ir.load(directory / "model.onnx")
    unsealed.metadata_props[FILES_ENTRY] = json.dumps(files)
    unsealed.metadata_props["lora_deploy.model_sha256"] = "0" * 64
    ir.save(unsealed, directory / "model.onnx")
    content = (directory / "model.onnx").read_bytes()
    (directory / "model.onnx").write_bytes(seal_bytes("model.onnx", content))


@pytest.mark.parametrize("change", CHANGES)
def test_nothing_of_another_export_and_nothing_that_was_changed_passes(
    change: str, made: Path, other: BranchExport, command: Command
) -> None:
    damage, named = CHANGES[change]
    damage(made, other.output)
    assert_one_message(command("verify", made, "--quiet"), 3, *named)


def test_a_file_of_the_users_is_nobodys_business(made: Path) -> None:
    (made / "notes.txt").write_text("mine")
    assert check_files(made)


def test_an_adapter_that_was_converted_later_is_sealed(made: Path, branch_export: BranchFactory) -> None:
    """Every bit of the file counts, padding included."""
    adapter = branch_export("llama", "nf4", adapters=TWO).adapters["two"]
    file = convert_adapter(adapter, made, "later")
    check_files(made)
    whole = file.read_bytes()
    for place in [*range(0, 64), *range(64, len(whole), len(whole) // 97)]:
        content = bytearray(whole)
        content[place] ^= 1 << place % 8
        file.write_bytes(content)
        with pytest.raises(AdapterError, match="damaged, or lora-deploy did not write"):
            check_sealed(file)
    for size in (0, 3, 12, 40, len(whole) - 1):
        file.write_bytes(whole[:size])
        with pytest.raises(AdapterError, match="damaged, or lora-deploy did not write"):
            check_sealed(file)


def test_a_seal_is_of_the_whole_content() -> None:
    text = b'{"a": 1, "report_sha256": "' + b"0" * 64 + b'"}'
    sealed = seal_bytes("parity.json", text)
    assert seal_of("parity.json", sealed) is not None
    assert seal_of("parity.json", text) is None
    assert seal_of("parity.json", sealed + sealed) is None
    for place in range(len(sealed)):
        for bit in range(8):
            flipped = bytearray(sealed)
            flipped[place] ^= 1 << bit
            assert seal_of("parity.json", bytes(flipped)) is None


def test_a_seal_can_be_made_anew_and_is_no_signature(made: Path) -> None:
    (made / "config.json").write_text("{}")
    reseal(made)
    check_files(made)
