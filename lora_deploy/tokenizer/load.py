"""Open the tokenizer of an export: the light one where it is sure to be the same, else transformers' own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lora_deploy.errors import CheckpointError
from lora_deploy.tokenizer.build import build_backend
from lora_deploy.tokenizer.light import LightTokenizer
from lora_deploy.tokenizer.settings import read_settings

__all__ = ["load_tokenizer"]


def load_tokenizer(directory: Path) -> Any:
    """Load the tokenizer of an export.

    Args:
        directory: Holds `config.json` and the tokenizer's files.

    Returns:
        A `LightTokenizer`; or, where transformers' AutoTokenizer may give something else than that would, what
        AutoTokenizer gives, which takes the time that torch and transformers need to be imported.

    Raises:
        CheckpointError: There is none, or it cannot be read.
    """
    try:
        settings = read_settings(directory)
        return LightTokenizer(build_backend(settings), settings)
    except Exception:  # whatever is the matter, transformers decides whether it is an error
        return _load_whole(directory)


def _load_whole(directory: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        # Some names of models, such as a relative path may spell, make transformers take another class.
        return AutoTokenizer.from_pretrained(directory.absolute(), trust_remote_code=False)
    except Exception as error:  # what transformers and tokenizers raise has no common base
        raise CheckpointError(
            "the export has no tokenizer that can be read",
            file=directory,
            found=f"{type(error).__name__}: {error}".splitlines()[0][:200],
            remedy="export again from a base that has its tokenizer files",
        ) from error
