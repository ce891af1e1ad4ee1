"""The files of a model's directory: its configuration, its index, and the shards, by their headers."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from lora_deploy.errors import CheckpointError
from lora_deploy.inputs.configuration import check_configuration
from lora_deploy.inputs.headers import Entry, read_header
from lora_deploy.inputs.json_files import read_json

__all__ = ["ModelFiles", "local_directory", "open_model"]

_CONFIG = "config.json"
_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "adapter_model.bin")


class ModelFiles(NamedTuple):
    """What a model's directory holds.

    Attributes:
        config: `config.json`.
        headers: The entries of each file with weights, by name of the tensor.
    """

    config: dict[str, Any]
    headers: dict[Path, dict[str, Entry]]


def local_directory(model: str | Path) -> Path | None:
    """The directory of a model; None where it can only be a hub id.

    Raises:
        CheckpointError: It is a path, and no directory.
    """
    path = Path(model)
    try:
        is_directory, exists = path.is_dir(), path.exists()
    except (OSError, ValueError):  # a name that is too long for the file system, or that no file can have
        is_directory, exists = False, True
    if is_directory:
        return path
    if exists or path.is_absolute() or str(model).startswith(".") or str(model).count("/") > 1:
        raise CheckpointError(
            "the model is not a directory", file=path, expected="a directory with config.json and model.safetensors"
        )
    return None


def open_model(directory: Path) -> ModelFiles:
    """Read the configuration of a model and the headers of its weights, and check both.

    Args:
        directory: Holds `config.json` and `model.safetensors`, or shards with `model.safetensors.index.json`.

    Raises:
        CheckpointError: A file is missing, truncated, damaged or leads out of the directory, the weights are pickles,
            or the configuration asks for more than the weights can be.
    """
    config = read_json(directory / _CONFIG)
    headers: dict[Path, dict[str, Entry]] = {}
    home: dict[str, Path] = {}
    for file, expected in _find_files(directory).items():
        try:
            headers[file] = read_header(file, CheckpointError)
        except FileNotFoundError:
            raise CheckpointError("a shard of the model is missing", file=file) from None
        for name in sorted(expected - headers[file].keys()):
            raise CheckpointError(
                "a tensor that the index lists is not in its shard", file=file, tensor=name, found="no such tensor"
            )
        for name in headers[file]:
            if home.setdefault(name, file) != file:
                raise CheckpointError(
                    "a tensor is in two shards, and it is not known which is meant",
                    file=file,
                    tensor=name,
                    found=f"it is in {home[name].name} too",
                    expected="each tensor once",
                    remedy="download the model again, or save it again with save_pretrained()",
                )
    check_configuration(config, directory / _CONFIG, len(home))
    return ModelFiles(config, headers)


def _find_files(directory: Path) -> dict[Path, set[str]]:
    """The files that hold the weights, each with the names that the index expects there (none without index)."""
    single, index = directory / _SINGLE, directory / _INDEX
    if single.is_file():
        return {single: set()}
    if index.is_file():
        return _read_index(index)
    pickles = [name for name in _PICKLES if (directory / name).exists() or (directory / name).is_symlink()]
    if pickles:
        raise CheckpointError(
            "the weights are a pickle, which can run code when it is read",
            file=directory / pickles[0],
            expected=_SINGLE,
            remedy="load the model with transformers and save it with save_pretrained()",
        )
    raise CheckpointError("the model has no weights", file=directory, expected=f"{_SINGLE} or {_INDEX}")


def _read_index(index: Path) -> dict[Path, set[str]]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError("the index lists no tensors", file=index, expected="a weight_map")
    files: dict[Path, set[str]] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not _is_plain(shard):
            raise CheckpointError(
                "the index names something else than a safetensors file in the model's directory",
                file=index,
                tensor=ascii(name)[1:-1][:200],
                found=ascii(shard)[:200],
                expected="a name like model-00001-of-00002.safetensors",
                remedy="download the model again, from a source that you trust",
            )
        files.setdefault(index.parent / shard, set()).add(name)
    return files


def _is_plain(shard: str) -> bool:
    """Whether a name is that of a safetensors file in the same directory, on any system."""
    return shard.endswith(".safetensors") and shard.isprintable() and not set(shard) & set("/\\:") and len(shard) < 200
