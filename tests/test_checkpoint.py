"""Reading safetensors checkpoints, and every way in which one can be broken."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_deploy.checkpoint import Checkpoint, resolve_model
from lora_deploy.errors import CheckpointError
from tests.conftest import CheckpointFactory, tiny_model

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD_SIZE = 60_000


def _first_shard(directory: Path) -> Path:
    return sorted(directory.glob("*.safetensors"))[0]


def _edit_index(directory: Path, change: Callable[[dict[str, str]], object]) -> None:
    index = json.loads((directory / INDEX).read_text())
    change(index["weight_map"])
    (directory / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize("max_shard_size", ["5GB", SHARD_SIZE], ids=["single", "sharded"])
def test_every_tensor_is_found_with_its_shape_file_and_bits(
    max_shard_size: str | int, checkpoint_dir: CheckpointFactory
) -> None:
    directory = checkpoint_dir("llama", max_shard_size=max_shard_size)
    checkpoint = Checkpoint(directory)
    expected = tiny_model("llama").state_dict()
    assert set(checkpoint) == set(expected)
    for name, values in expected.items():
        assert checkpoint.shape(name) == tuple(values.shape)
        assert torch.equal(checkpoint.read(name), values)
        assert name in load_file(checkpoint.file(name))
    assert len({checkpoint.file(name) for name in checkpoint}) == (1 if max_shard_size == "5GB" else 7)


def _truncate(file: Path, keep: float) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * keep)])


SINGLE_FILE_FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda d: (d / "config.json").unlink(), "config.json"),
    "config that is no JSON": (lambda d: (d / "config.json").write_text("{"), "config.json"),
    "config that is no object": (lambda d: (d / "config.json").write_text("[]"), "config.json"),
    "config that is no text": (lambda d: (d / "config.json").write_bytes(b"\xff\xfe{"), "config.json"),
    "no weights": (lambda d: (d / WEIGHTS).unlink(), "checkpoint"),
    "empty weights": (lambda d: _truncate(d / WEIGHTS, 0), WEIGHTS),
    "truncated header": (lambda d: _truncate(d / WEIGHTS, 0.002), WEIGHTS),
    "truncated data": (lambda d: _truncate(d / WEIGHTS, 0.9), WEIGHTS),
    "no safetensors": (lambda d: (d / WEIGHTS).write_bytes(b"\x80\x02}q\x00." * 99), WEIGHTS),
    "weights that are a directory": (lambda d: ((d / WEIGHTS).unlink(), (d / WEIGHTS).mkdir()), "checkpoint"),
    "only a pickle": (lambda d: (d / WEIGHTS).rename(d / "pytorch_model.bin"), "pytorch_model.bin"),
}
SHARDED_FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing shard": (lambda d: _first_shard(d).unlink(), "model-00001-of-00007.safetensors"),
    "truncated shard": (lambda d: _truncate(_first_shard(d), 0.9), "model-00001-of-00007.safetensors"),
    "index that is no JSON": (lambda d: (d / INDEX).write_text("{"), INDEX),
    "index without a map": (lambda d: (d / INDEX).write_text("{}"), INDEX),
    "index with an empty map": (lambda d: _edit_index(d, dict.clear), INDEX),
    "index that climbs out": (lambda d: _edit_index(d, lambda m: m.update(x="../x.safetensors")), INDEX),
    "index with an absolute path": (lambda d: _edit_index(d, lambda m: m.update(x="/etc/passwd")), INDEX),
    "index that names its own parent": (lambda d: _edit_index(d, lambda m: m.update(x="..")), INDEX),
    "index with a number": (lambda d: _edit_index(d, lambda m: m.update(x=3)), INDEX),
}


@pytest.mark.parametrize("fault", SINGLE_FILE_FAULTS)
def test_a_broken_single_file_checkpoint_is_refused_with_the_files_name(
    fault: str, own_checkpoint: CheckpointFactory
) -> None:
    directory = own_checkpoint("llama")
    break_it, named = SINGLE_FILE_FAULTS[fault]
    break_it(directory)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint(directory)
    assert Path(caught.value.details["file"]).name == named
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("fault", SHARDED_FAULTS)
def test_a_broken_sharded_checkpoint_is_refused_with_the_files_name(
    fault: str, own_checkpoint: CheckpointFactory
) -> None:
    directory = own_checkpoint("llama", max_shard_size=SHARD_SIZE)
    break_it, named = SHARDED_FAULTS[fault]
    break_it(directory)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint(directory)
    assert Path(caught.value.details["file"]).name == named
    assert caught.value.exit_code == 3


def test_a_tensor_that_the_index_promises_and_the_shard_lacks_is_named(own_checkpoint: CheckpointFactory) -> None:
    directory = own_checkpoint("llama", max_shard_size=SHARD_SIZE)
    shard = _first_shard(directory)
    tensors = load_file(shard)
    lost = sorted(tensors)[0]
    save_file({name: values for name, values in tensors.items() if name != lost}, shard)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint(directory)
    assert caught.value.details["tensor"] == lost
    assert Path(caught.value.details["file"]) == shard


def test_a_pickle_is_refused_with_the_way_to_convert_it_and_never_opened(own_checkpoint: CheckpointFactory) -> None:
    directory = own_checkpoint("llama")
    (directory / WEIGHTS).unlink()
    (directory / "pytorch_model.bin").symlink_to("nowhere")  # opening it would fail in another way
    (directory / "pytorch_model.bin.index.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"pickle[\s\S]*save_pretrained"):
        Checkpoint(directory)


def test_a_pickle_beside_safetensors_is_ignored(own_checkpoint: CheckpointFactory) -> None:
    directory = own_checkpoint("llama")
    (directory / "pytorch_model.bin").write_bytes(b"whatever")
    assert "lm_head.weight" in Checkpoint(directory)


def test_reading_a_tensor_that_is_not_there_names_it(checkpoint_dir: CheckpointFactory) -> None:
    with pytest.raises(CheckpointError) as caught:
        Checkpoint(checkpoint_dir("llama")).read("no.such.weight")
    assert caught.value.details["tensor"] == "no.such.weight"


def test_a_file_that_shrinks_after_it_was_opened_is_an_error_of_the_checkpoint(
    own_checkpoint: CheckpointFactory,
) -> None:
    directory = own_checkpoint("llama")
    checkpoint = Checkpoint(directory)
    _truncate(directory / WEIGHTS, 0.5)
    with pytest.raises(CheckpointError) as caught:
        checkpoint.read("lm_head.weight")
    assert Path(caught.value.details["file"]).name == WEIGHTS


def test_a_model_is_a_directory_and_a_missing_path_is_not_looked_up_on_the_hub(tmp_path: Path) -> None:
    assert resolve_model(str(tmp_path)) == tmp_path
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "missing", "./missing", "a/b/c"):
        with pytest.raises(CheckpointError, match="not a directory"):
            resolve_model(path)


def test_a_hub_id_that_cannot_be_had_is_an_error_of_the_checkpoint() -> None:
    with pytest.raises(CheckpointError, match="the hub") as caught:
        resolve_model("nobody/no-such-model")
    assert caught.value.details["file"] == "nobody/no-such-model"
