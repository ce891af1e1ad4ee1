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
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:  # what transformers and tokenizers raise has no common base
        raise CheckpointError(
            "the export has no tokenizer that can be read",
            file=directory,
            found=f"{type(error).__name__}: {error}".splitlines()[0][:200],
            remedy="export again from a base that has its tokenizer files",
        ) from error
