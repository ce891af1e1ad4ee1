"""Safetensors checkpoints, read one tensor at a time.

`safetensors` maps a whole file into memory, and the kernel counts mapped pages as resident until the
file is closed. So each read opens the file, takes one tensor and lets go of it: the peak is the
largest tensor, not the file.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from lora_deploy.errors import CheckpointError

__all__ = ["Checkpoint", "resolve_model"]

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "adapter_model.bin")


def resolve_model(model: str | Path) -> Path:
    """The local directory of a model: the path itself, or the snapshot of a hub id.

    Raises:
        CheckpointError: There is neither.
    """
    path = Path(model)
    try:
        is_directory, exists = path.is_dir(), path.exists()
    except OSError:  # a name that is too long for the file system
        is_directory, exists = False, True
    if is_directory:
        return path
    if exists or path.is_absolute() or str(model).startswith(".") or str(model).count("/") > 1:
        raise CheckpointError(
            "the model is not a directory", file=path, expected="a directory with config.json and model.safetensors"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(str(model), allow_patterns=["*.json", "*.safetensors", "*.txt", "*.jinja", "*.model"])
        )
    except Exception as error:
        raise CheckpointError(
            "the model is neither a local directory nor a model that the hub gives",
            file=str(model),
            found=f"{type(error).__name__}: {error}".splitlines()[0],
            remedy="check the path or the hub id, and the network",
        ) from error


def read_json(file: Path, error: type[CheckpointError] = CheckpointError) -> dict[str, Any]:
    """Read a JSON object that must be there."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise error("a file of the model is missing", file=file, remedy="copy or download the model again") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as cause:
        raise error("a file of the model cannot be read", file=file, found=str(cause)) from cause
    if not isinstance(values, dict):
        raise error("a file of the model is no JSON object", file=file, found=type(values).__name__)
    return values


class Checkpoint:
    """The tensors of a model directory, single-file or sharded, by name.

    Args:
        directory: Holds `config.json` and `model.safetensors`, or shards with `model.safetensors.index.json`.

    Raises:
        CheckpointError: A file is missing, truncated or damaged, or the weights are pickles.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.config = read_json(self.directory / "config.json")
        self._files: dict[str, Path] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for file, expected in self._find_files().items():
            found = self._open_headers(file)
            for name in expected - found if expected else ():
                raise CheckpointError(
                    "a tensor that the index lists is not in its shard", file=file, tensor=name, found="no such tensor"
                )

    def _find_files(self) -> dict[Path, set[str]]:
        """The files that hold the weights, each with the names that the index expects there (none without index)."""
        single, index = self.directory / _SINGLE, self.directory / _INDEX
        if single.is_file():
            return {single: set()}
        if index.is_file():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise CheckpointError("the index lists no tensors", file=index, expected="a weight_map")
            files: dict[Path, set[str]] = {}
            for name, shard in weight_map.items():
                if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
                    raise CheckpointError(
                        "the index names something else than a safetensors file in the model's directory",
                        file=index,
                        tensor=name,
                        found=shard,
                    )
                files.setdefault(self.directory / shard, set()).add(name)
            return files
        pickles = [name for name in _PICKLES if (self.directory / name).exists()]
        if pickles:
            raise CheckpointError(
                "the weights are a pickle, which can run code when it is read",
                file=self.directory / pickles[0],
                expected=_SINGLE,
                remedy="load the model with transformers and save it with save_pretrained()",
            )
        raise CheckpointError("the model has no weights", file=self.directory, expected=f"{_SINGLE} or {_INDEX}")

    def _open_headers(self, file: Path) -> set[str]:
        try:
            with safe_open(file, framework="pt") as opened:
                names = set(opened.keys())
                for name in names:
                    self._files[name] = file
                    self._shapes[name] = tuple(opened.get_slice(name).get_shape())
        except FileNotFoundError:
            raise CheckpointError("a shard of the model is missing", file=file) from None
        except (SafetensorError, OSError) as error:
            raise _damaged(file, error) from error
        return names

    def __contains__(self, name: object) -> bool:
        return name in self._files

    def __iter__(self) -> Any:
        return iter(self._files)

    def file(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self._files[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, without reading it."""
        return self._shapes[name]

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor. Its memory is a mapping of the file that ends with the tensor.

        Raises:
            CheckpointError: There is no such tensor, or the file was damaged since it was opened.
        """
        if name not in self._files:
            raise CheckpointError("a tensor of the model is missing", file=self.directory, tensor=name)
        try:
            with safe_open(self._files[name], framework="pt") as opened:
                return opened.get_tensor(name)  # type: ignore[no-any-return]
        except (SafetensorError, OSError) as error:
            raise _damaged(self._files[name], error) from error


def _damaged(file: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        "the weights are truncated or damaged",
        file=file,
        found=str(error),
        expected="a whole safetensors file",
        remedy="copy or download the file again",
    )
