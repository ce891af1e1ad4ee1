"""`--layout triton`: a model repository that Triton's schema and its onnxruntime backend's rules accept."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from google.protobuf import text_format
from safetensors.torch import save_file

from lora_deploy.adapter import write_adapter
from lora_deploy.integrity import check_files
from tests.commands import Command, assert_one_message, command
from tests.conftest import CheckpointFactory, random_adapter, tiny_model
from tests.encoder_decoders import save_t5

__all__ = ["command"]

# Triton's ValidateInputs maps these (onnxruntime_backend, src/onnxruntime_utils.cc).
TYPES = {"tensor(int64)": "TYPE_INT64", "tensor(float)": "TYPE_FP32", "tensor(float16)": "TYPE_FP16"}


def model_config() -> Any:
    """Triton's own schema, without its client, which needs gRPC."""
    found = importlib.util.find_spec("tritonclient")
    assert found is not None
    assert found.submodule_search_locations is not None
    file = Path(next(iter(found.submodule_search_locations))) / "grpc" / "model_config_pb2.py"
    spec = importlib.util.spec_from_file_location("model_config_pb2", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def asked(checkpoint_dir: CheckpointFactory, tmp_path: Path) -> list[object]:
    """Arguments of an export of a tiny adapter into a model repository."""
    write_adapter(random_adapter(tiny_model("llama"), target_modules=["q_proj", "v_proj"]), tmp_path / "json")
    base = ["--model", checkpoint_dir("llama"), "--adapter", tmp_path / "json", "--quantization", "nf4"]
    return ["export", *base, "--no-verify", "--quiet", "--output", tmp_path / "models" / "reminders"]


@pytest.mark.parametrize(
    "mode", [["--merge"], ["--merge", "--precision", "int8"], ["--branch"], ["--branch", "--pool"]]
)
def test_the_configuration_is_that_of_the_graph(
    mode: list[str], asked: list[object], tmp_path: Path, command: Command
) -> None:
    ended = command(*asked, *mode, "--layout", "triton")
    assert ended.code == 0, ended.err
    place = tmp_path / "models" / "reminders"
    assert check_files(place / "1")
    schema = model_config()
    config = text_format.Parse((place / "config.pbtxt").read_text(), schema.ModelConfig())
    assert (config.name, config.backend, config.max_batch_size) == ("reminders", "onnxruntime", 0)
    assert config.instance_group[0].kind == schema.ModelInstanceGroup.KIND_CPU
    session = onnxruntime.InferenceSession(place / "1" / "model.onnx")
    optional = {node.name: node for node in session.get_overridable_initializers()}
    inputs = {node.name: node for node in session.get_inputs()} | optional
    assert {value.name for value in config.input} == set(inputs)
    assert {value.name for value in config.output} == {node.name for node in session.get_outputs()}
    assert {value.name for value in config.input if value.optional} == set(optional)
    assert bool(optional) == ("--branch" in mode)
    for value in config.input:
        node = inputs[value.name]
        assert schema.DataType.Name(value.data_type) == TYPES[node.type]
        # Triton asks for the same rank, and for the same size of what is no -1 in both.
        assert len(value.dims) == len(node.shape)
        for told, real in zip(value.dims, node.shape, strict=True):
            assert told == -1 or told == real
            assert told != 0


def test_a_configuration_that_is_there_stays(asked: list[object], tmp_path: Path, command: Command) -> None:
    file = tmp_path / "models" / "reminders" / "config.pbtxt"
    file.parent.mkdir(parents=True)
    file.write_text("tuned by hand")
    assert_one_message(command(*asked, "--merge", "--layout", "triton"), 5, file, "--overwrite")
    assert file.read_text() == "tuned by hand"
    assert not (file.parent / "1").exists()
    assert command(*asked, "--merge", "--layout", "triton", "--overwrite").code == 0
    assert "max_batch_size: 0" in file.read_text()


def test_a_layout_that_is_none(asked: list[object], tmp_path: Path, command: Command) -> None:
    assert_one_message(command(*asked, "--merge", "--layout", "tritn"), 2, "tritn", "plain or triton")
    assert not (tmp_path / "models").exists()


def test_an_encoder_decoder_is_refused_before_it_is_exported(tmp_path: Path, command: Command) -> None:
    save_t5("gated", tmp_path / "base")
    rest = ("--adapter", tmp_path / "adapter", "--merge", "--quiet", "--output", tmp_path / "models" / "t5")
    config = {"peft_type": "LORA", "task_type": "SEQ_2_SEQ_LM", "r": 2, "target_modules": ["q", "v"]}
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(config))
    save_file({"base_model.model.x.q.lora_A.weight": torch.zeros(2, 4)}, tmp_path / "adapter/adapter_model.safetensors")
    ended = command("export", "--model", tmp_path / "base", *rest, "--layout", "triton")
    assert_one_message(ended, 2, "an encoder-decoder is three graphs", tmp_path / "base")
    assert not (tmp_path / "models").exists()
