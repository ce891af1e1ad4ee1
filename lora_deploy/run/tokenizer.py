"""The tokenizer that an export brings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lora_deploy.errors import CheckpointError

__all__ = ["load_tokenizer"]


def load_tokenizer(directory: Path) -> Any:
    """Load the tokenizer of an export.

    Raises:
        CheckpointError: There is none, or it cannot be read.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(directory)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            "the export has no tokenizer that can be read",
            file=directory,
            found=str(error).splitlines()[0],
            remedy="export again from a base that has its tokenizer files",
        ) from error
