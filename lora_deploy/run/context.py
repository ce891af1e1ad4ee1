"""How many tokens a model takes: its tables of positions end there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_deploy.errors import UsageError
from lora_deploy.inputs.json_files import read_json

__all__ = ["check_context", "read_context_length"]


def read_context_length(directory: Path) -> int | None:
    """How many tokens a model takes, prompt and answer; None where its configuration does not say.

    Args:
        directory: May hold `config.json`.

    Raises:
        CheckpointError: The configuration is damaged.
    """
    file = directory / "config.json"
    config: dict[str, Any] = read_json(file) if file.is_file() else {}
    for name in ("max_position_embeddings", "n_positions"):
        if type(config.get(name)) is int and config[name] > 0:
            return int(config[name])
    return None


def check_context(limit: int, attention_mask: NDArray[np.int64], *, in_place: bool) -> None:
    """Make sure that every token has a place in the tables of positions.

    Args:
        limit: Tokens that the model takes.
        attention_mask: (batch, past + new).
        in_place: Whether padding takes places too, as in graphs that write into their cache.

    Raises:
        UsageError: There are more.
    """
    longest = attention_mask.shape[1] if in_place else int(attention_mask.sum(axis=1).max(initial=0))
    if longest > limit:
        raise UsageError(
            "these are more tokens than the model has positions for",
            found=f"{longest} tokens a row, past and new{', padding included' if in_place else ''}",
            expected=f"at most {limit}",
            remedy="shorten the prompt or the answer" + (", or run the rows one by one" if in_place else ""),
        )
