"""What can be known of the files of a model and its adapters before anything heavy is imported.

torch and transformers take seconds and 400 MB to import; nothing here needs them. The commands refuse bad input with
this code first, and what reads the files later goes through the same code, so that the messages are the same.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

__all__ = ["check_inputs"]


def check_inputs(model: str | Path | None = None, adapters: Iterable[str | Path] = ()) -> None:
    """Check the files of a model and its adapters.

    Args:
        model: A local directory; a hub id is left for later.
        adapters: Directories.

    Raises:
        InputError: A file is missing, damaged, hostile, or leads out of its directory.
    """
    from lora_deploy.inputs.adapter import open_adapter
    from lora_deploy.inputs.model import local_directory, open_model

    for adapter in adapters:
        open_adapter(adapter)
    directory = local_directory(model) if model is not None else None
    if directory is not None:
        open_model(directory)
