"""What is stored of an adapter in int8 is held against the adapter itself, byte for byte."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from lora_deploy.adapter import read_adapter
from lora_deploy.errors import ParityError
from lora_deploy.integrity import find_adapters
from lora_deploy.manifest import Manifest
from lora_deploy.run.adapter_files import read_tensors
from lora_deploy.verify import verify
from lora_deploy.verify.codes import check_adapter_codes
from tests.commands import Command, assert_one_message
from tests.export.conftest import BranchExport, BranchFactory
from tests.run.test_adapter_files import write
from tests.sealed import reseal, save_graph


@pytest.fixture
def made(branch_export: BranchFactory) -> BranchExport:
    return branch_export("llama", "nf4", adapters={"one": {}, "two": {"seed": 3}}, adapter_precision="int8")


def test_verify_compares_an_int8_export_with_its_rounded_adapters(
    made: BranchExport, tmp_path: Path, command: Command
) -> None:
    output = Path(shutil.copytree(made.output, tmp_path / "out"))
    ended = command("verify", output, "--json")
    assert ended.code == 0, ended.err
    report = json.loads(ended.out)
    assert report["precision"] == "fp32"
    assert report["control_failed"] is True
    assert max(case["export"]["max_abs"] for case in report["cases"]) < 1e-3


@pytest.mark.parametrize("part", ["lora_A_codes", "lora_A_scales", "lora_B_codes", "lora_B_scales"])
def test_one_value_of_a_file_that_is_another_fails(
    part: str, made: BranchExport, tmp_path: Path, command: Command
) -> None:
    """A step of a single code is far below what the logits would tell."""
    output = Path(shutil.copytree(made.output, tmp_path / "out"))
    file = find_adapters(output)["one"]
    version, tensors = read_tensors(file)
    name = next(key for key in tensors if key.endswith(f"down_proj/{part}"))
    values = tensors[name].reshape(-1)
    values[5] += -np.sign(values[5]) if "codes" in part else values[5] * np.float32(1e-6)
    write(file, tensors, version)
    reseal(output)
    assert_one_message(command("verify", output, "--quiet"), 4, "not what quantizing it gives", name, file)
    assert verify(output, adapter=["two"]).passed


def test_a_fixed_export_holds_its_own_adapter(branch_export: BranchFactory) -> None:
    made = branch_export("llama", "nf4", "fixed", {"one": {}}, adapter_precision="int8")
    adapter = read_adapter(made.adapters["one"])
    check_adapter_codes(made.output, {"one": adapter})
    adapter.updates["model.layers.1.self_attn.k_proj"].B[3, 0] += 0.01
    with pytest.raises(ParityError, match="not what quantizing it gives") as caught:
        check_adapter_codes(made.output, {"one": adapter})
    assert "layers/1/self_attn" in caught.value.details["tensor"]
    assert "lora_B" in caught.value.details["tensor"]


def test_floats_are_left_to_the_logits(branch_export: BranchFactory) -> None:
    made = branch_export("llama", "nf4", "fixed", {"one": {}})
    other = read_adapter(branch_export("llama", "nf4", "fixed", {"one": {"seed": 9}}).adapters["one"])
    check_adapter_codes(made.output, {"one": other})


def test_an_initializer_that_was_changed_fails(branch_export: BranchFactory, tmp_path: Path) -> None:
    """The scales of small slots stand in model.onnx itself, and its seal can be made anew."""
    made = branch_export("llama", "nf4", "fixed", {"one": {}}, adapter_precision="int8")
    output = Path(shutil.copytree(made.output, tmp_path / "out"))
    model = ir.load(output / "model.onnx")
    name = Manifest.load(output).slots[0].input_names[3]
    value = model.graph.initializers[name]
    assert value.const_value is not None
    value.const_value = ir.Tensor(value.const_value.numpy() * np.float32(1.000001), name=name)
    save_graph(model, output)
    with pytest.raises(ParityError, match="not what quantizing it gives") as caught:
        verify(output)
    assert caught.value.details["tensor"] == name
