"""What goes into a graph and comes out of it, held to what a language model or a classifier has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lora_deploy.errors import CheckpointError

__all__ = ["check_cache_input", "check_logits", "first_line"]

FLOATS = ("tensor(float)", "tensor(float16)", "tensor(bfloat16)")
# Heads times their width: an empty cache gets room for some thousand tokens of it, in every layer.
_MOST_WIDTH = 1 << 18


def check_cache_input(file: Path, node: Any) -> None:
    """Make sure that a cache can be made for an input.

    Args:
        file: The graph's, for messages.
        node: The input, as onnxruntime describes it.

    Raises:
        CheckpointError: It is not floats (batch, heads, tokens, width), or absurdly wide.
    """
    width = 1
    for size in node.shape[1:]:
        width *= max(size, 1) if isinstance(size, int) else 1
    if len(node.shape) != 4 or node.type not in FLOATS or width > _MOST_WIDTH:
        raise CheckpointError(
            "the model takes no cache that can be made for it",
            file=file,
            tensor=node.name,
            found=f"{node.type} {tuple(node.shape)}",
            expected=f"floats (batch, heads, tokens, width), of at most {_MOST_WIDTH:,} values a token",
            remedy="export again",
        )


def check_logits(file: Path, value: Any, batch: int, new: int) -> None:
    """Make sure that what a graph gives for logits can be them.

    Args:
        file: The graph's, for messages.
        value: The OrtValue; None where the graph has no output of this name.
        batch: Rows.
        new: Tokens that were run.

    Raises:
        CheckpointError: They are not floats (batch, new, vocabulary) or (batch, labels).
    """
    if value is not None and value.is_tensor() and value.data_type() in FLOATS:
        shape = tuple(value.shape())
        if shape[:1] == (batch,) and 0 not in shape and (len(shape) == 2 or (len(shape) == 3 and shape[1] == new)):
            return
    found = None
    if value is not None:
        found = f"{value.data_type()} {tuple(value.shape()) if value.is_tensor() else ''}".strip()
    raise CheckpointError(
        "the model does not give what is expected of it",
        file=file,
        tensor="logits",
        found=found or "no such output",
        expected=f"floats ({batch}, {new}, vocabulary), or of a classifier ({batch}, labels)",
        remedy="export again",
    )


def first_line(error: BaseException) -> str:
    """What an error of a library says, short; its name where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
