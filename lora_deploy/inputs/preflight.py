"""What a command can refuse at once: before torch and transformers, which take seconds and 400 MB to import."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from lora_deploy.inputs.adapter import open_adapter
from lora_deploy.inputs.model import local_directory, open_model

__all__ = ["check_inputs"]


def check_inputs(model: str | Path | None = None, adapters: Iterable[str | Path] = ()) -> None:
    """Check the files of a model and its adapters, by the same code that reads them later.

    Args:
        model: A local directory; a hub id is left for later.
        adapters: Directories.

    Raises:
        InputError: A file is missing, damaged, hostile, or leads out of its directory.
    """
    for adapter in adapters:
        open_adapter(adapter)
    directory = local_directory(model) if model is not None else None
    if directory is not None:
        open_model(directory)
