"""Safetensors checkpoints, read one tensor at a time: the peak is the largest tensor, not the file."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from lora_deploy.errors import CheckpointError
from lora_deploy.inputs.model import local_directory, open_model
from lora_deploy.reader import TensorReader

__all__ = ["Checkpoint", "resolve_model"]


def resolve_model(model: str | Path) -> Path:
    """The local directory of a model: the path itself, or the snapshot of a hub id.

    Raises:
        CheckpointError: There is neither.
    """
    directory = local_directory(model)
    if directory is not None:
        return directory
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


class Checkpoint:
    """The tensors of a model directory, single-file or sharded, by name.

    Args:
        directory: Holds `config.json` and `model.safetensors`, or shards with `model.safetensors.index.json`.

    Raises:
        CheckpointError: A file is missing, truncated, damaged or leads out of the directory, the weights are pickles,
            or the configuration asks for more than they can be.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.config, headers = open_model(self.directory)
        self._files = {name: file for file, entries in headers.items() for name in entries}
        self._reader = TensorReader()
        self._shapes = {name: entry.shape for entries in headers.values() for name, entry in entries.items()}

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

    def read(self, name: str, rows: range | None = None) -> torch.Tensor:
        """Read one tensor, or some of its rows. Its memory is a mapping of the file that ends with the tensor.

        Raises:
            CheckpointError: There is no such tensor, or the file was damaged since it was opened.
        """
        if name not in self._files:
            raise CheckpointError("a tensor of the model is missing", file=self.directory, tensor=name)
        try:
            return self._reader.read(self._files[name], name, math.prod(self._shapes[name]), rows)
        except Exception as error:  # torch's own, too, of a type or a shape that it cannot hold
            raise CheckpointError(
                "the weights are truncated or damaged",
                file=self._files[name],
                tensor=name,
                found=str(error).splitlines()[0][:200],
                expected="a tensor that torch can hold",
                remedy="copy or download the file again",
            ) from error
