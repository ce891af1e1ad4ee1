"""`verify` on an export that somebody changed: a single bit of codes, scales or recorded hashes is found."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from lora_deploy.manifest import Manifest
from tests.commands import Command, assert_one_message, command
from tests.export.conftest import BranchFactory
from tests.sealed import reseal, save_graph

__all__ = ["command"]


def _change_code(directory: Path, *, rehash: bool) -> None:
    weight = Manifest.load(directory).coded[0]
    value = ir.load(directory / "model.onnx").graph.initializers[weight.codes].const_value
    assert isinstance(value, ir.ExternalTensor)
    (data,) = directory.glob("*.data")
    raw = bytearray(data.read_bytes())
    raw[(value.offset or 0) + 100] ^= 1
    data.write_bytes(raw)
    if rehash:
        reseal(directory)


def _change_absmax(directory: Path) -> None:
    model = ir.load(directory / "model.onnx")
    weight = Manifest.load(directory).coded[1]
    value = model.graph.initializers[weight.scales]
    assert value.const_value is not None
    array = value.const_value.numpy().copy()
    array[3] = np.nextafter(array[3], np.float32(9))
    value.const_value = ir.Tensor(array, name=weight.scales)
    save_graph(model, directory)


def _change_hash(directory: Path) -> None:
    model = ir.load(directory / "model.onnx")
    entry = model.metadata_props["lora_deploy.coded"]
    sha256 = Manifest.load(directory).coded[2].modules[0].sha256
    model.metadata_props["lora_deploy.coded"] = entry.replace(sha256, sha256[::-1])
    save_graph(model, directory)


def _change_manifest(directory: Path) -> None:
    model = ir.load(directory / "model.onnx")
    model.metadata_props["lora_deploy.coded"] = '[{"operator": "MatMulBnb5"}]'
    save_graph(model, directory)


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        (partial(_change_code, rehash=False), 3, "a file of the export is damaged"),
        (partial(_change_code, rehash=True), 4, "the codes of a layer"),
        (_change_absmax, 4, "the scales of a layer"),
        (_change_hash, 4, "the base's quantized weight of a layer"),
        (_change_manifest, 3, "cannot be read"),
    ],
    ids=["code", "code and hash", "absmax", "recorded hash", "manifest"],
)
def test_verify_finds_a_single_bit_that_is_not_the_bases(
    change: Callable[[Path], None],
    code: int,
    message: str,
    branch_export: BranchFactory,
    command: Command,
    tmp_path: Path,
) -> None:
    directory = Path(shutil.copytree(branch_export("llama", "nf4", adapters={}).output, tmp_path / "out"))
    assert command("verify", directory, "--quiet") == (0, "", "")
    change(directory)
    assert_one_message(command("verify", directory, "--quiet"), code, message, directory)
