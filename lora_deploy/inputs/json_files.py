"""JSON files of strangers, read within bounds: a few bytes of JSON can take a hundred times their size in memory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_deploy.errors import CheckpointError, InputError
from lora_deploy.inputs.links import check_place

__all__ = ["LARGEST_JSON", "find_excess", "parse_json", "read_json"]

# The index of the largest checkpoints known, 200,000 tensors, has some 20 MB.
LARGEST_JSON = 1 << 25
_LARGEST_OTHER = 1 << 22
_MOST = {b"{": 50_000, b"[": 200_000, b",": 600_000, b'"': 1_200_000}


def find_excess(raw: bytes, most: Mapping[bytes, int]) -> str | None:
    """Whether JSON would take too much memory, by what it is made of. Nothing is parsed.

    Args:
        raw: The JSON.
        most: How often each byte may be in it.

    Returns:
        What there is too much of, or None.
    """
    for mark, bound in most.items():
        # A quote inside a string has a backslash before it.
        count = raw.count(mark) - (raw.count(b'\\"') if mark == b'"' else 0)
        if count > bound:
            return f"{count} times {mark.decode()}, more than {bound}"
    if len(raw) > _LARGEST_OTHER and not raw.isascii():  # such text takes up to four bytes a letter
        return f"{len(raw)} bytes that are not all ASCII, more than {_LARGEST_OTHER}"
    return None


def parse_json(file: Path, error: type[InputError]) -> Any:
    """Read a JSON file.

    Args:
        file: The file.
        error: Raised where it is refused.

    Raises:
        InputError: Of the kind of `error`: it leads out of its directory, or is too large.
        FileNotFoundError: There is no such file.
        OSError, ValueError: It cannot be read, or is no JSON.
    """
    check_place(file, error)
    with file.open("rb") as opened:
        raw = opened.read(LARGEST_JSON + 1)
    excess = f"more than {LARGEST_JSON} bytes" if len(raw) > LARGEST_JSON else find_excess(raw, _MOST)
    if excess:
        raise error("a JSON file is too large", file=file, found=excess, expected="what a model or an adapter needs")
    text = raw.decode("utf-8")
    del raw
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("brackets within brackets, too many to follow") from None


def read_json(file: Path, error: type[InputError] = CheckpointError) -> dict[str, Any]:
    """Read a JSON object that must be there.

    Args:
        file: The file.
        error: Raised where it is refused.

    Raises:
        InputError: Of the kind of `error`: it is missing, too large, damaged, or no object.
    """
    try:
        values = parse_json(file, error)
    except FileNotFoundError:
        raise error("a file of the model is missing", file=file, remedy="copy or download the model again") from None
    except (OSError, ValueError) as cause:
        raise error("a file of the model cannot be read", file=file, found=str(cause)[:200]) from cause
    if not isinstance(values, dict):
        raise error("a file of the model is no JSON object", file=file, found=type(values).__name__)
    return values
