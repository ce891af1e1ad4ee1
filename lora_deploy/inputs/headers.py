"""The header of a safetensors file, checked before the library reads it.

The library maps the file and trusts much of what it says: it takes the last of two tensors of one name, 100 MB of
header, and settings it does not know. Here a header must be exactly what the format describes
(https://huggingface.co/docs/safetensors/index#format), and what it costs to find out is bounded: a header is at most
`LARGEST_HEADER` bytes, and the brackets and strings in it are counted before anything is built of them. Whatever is
accepted here, the library accepts too.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

from lora_deploy.errors import InputError
from lora_deploy.inputs.json_files import find_excess
from lora_deploy.inputs.links import check_place

__all__ = ["BITS", "LARGEST_HEADER", "Entry", "read_header"]

# A header of the largest checkpoints known (a mixture of 384 experts in one file) has some 10 MB.
LARGEST_HEADER = 1 << 24
# Of each kind of byte, at most: brackets of 100,000 tensors, quotes and commas of their entries and of metadata.
_MOST = {b"{": 100_001, b"[": 200_000, b":": 420_000, b",": 1_000_000, b'"': 1_200_000}
_LONGEST_SHAPE = 64
_BIGGEST = (1 << 63) - 1  # torch counts in signed 64-bit numbers, safetensors in unsigned ones

# Bits of an element of each type that safetensors 0.8 knows.
BITS = {
    "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip


class Entry(NamedTuple):
    """What a header says of a tensor.

    Attributes:
        dtype: One of BITS.
        shape: Its sizes.
        begin: Of its bytes, counted from the end of the header.
        end: Of its bytes.
    """

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class _Fault(Exception):
    """What is wrong with a header."""

    def __init__(self, found: object, expected: object, tensor: str | None = None) -> None:
        super().__init__(found)
        self.found, self.expected, self.tensor = found, expected, tensor


def read_header(file: Path, error: type[InputError], what: str = "the weights") -> dict[str, Entry]:
    """Read and check the header of a safetensors file. The data behind it are not read.

    Args:
        file: The file.
        error: Raised where the header is wrong.
        what: The file, in the message.

    Returns:
        Every tensor's entry by name, in the order of their bytes.

    Raises:
        InputError: Of the kind of `error`: the file is no whole safetensors file, or leads out of its directory.
        FileNotFoundError: There is no such file.
    """
    check_place(file, error)
    try:
        with file.open("rb") as opened:
            size = os.fstat(opened.fileno()).st_size
            text = _read_text(opened.read(8), size, opened.read)
        entries = _check(_parse(text))
        _check_bytes(entries, size - 8 - len(text.encode()))
    except FileNotFoundError:
        raise
    except (_Fault, OSError) as fault:
        raise error(
            f"{what} are truncated or damaged",
            file=file,
            tensor=getattr(fault, "tensor", None),
            found=getattr(fault, "found", fault),
            expected=getattr(fault, "expected", "a file that can be read"),
            remedy="copy or download the file again, from a source that you trust",
        ) from fault
    return entries


def _read_text(start: bytes, size: int, read: Any) -> str:
    """The header's text, once its length and the number of its parts are known to be bearable."""
    if len(start) < 8:
        raise _Fault(f"{size} bytes", "a safetensors file, which begins with 8 bytes for the length of its header")
    length = int.from_bytes(start, "little")
    if length > size - 8:
        raise _Fault(f"a header of {length} bytes in a file of {size}", "a header that ends before the file does")
    if length > LARGEST_HEADER:
        raise _Fault(f"a header of {length} bytes", f"at most {LARGEST_HEADER}")
    raw: bytes = read(length)
    if len(raw) < length:
        raise _Fault(f"{len(raw)} of {length} bytes of the header", "a whole header")
    excess = find_excess(raw, _MOST)
    if excess:
        raise _Fault(f"a header with {excess}", "what a checkpoint needs")
    if not raw.startswith(b"{"):
        raise _Fault(f"a header that begins with {raw[:8]!r}", "a JSON object, which begins with {")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _Fault(str(error), "a header in UTF-8") from None


def _parse(text: str) -> dict[str, Any]:
    try:
        values = json.loads(
            text,
            object_pairs_hook=_once,
            parse_int=_whole,
            parse_float=_no_number,
            parse_constant=_no_number,
        )
    except (ValueError, RecursionError) as error:
        raise _Fault(f"{type(error).__name__}: {error}"[:200], "a header in JSON") from None
    assert isinstance(values, dict)  # for it begins with a brace
    return values


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise _Fault(f"{_short(twice)} twice", "each name once", _short(twice))
    return values


def _whole(digits: str) -> int:
    if digits.startswith("-") or len(digits) > 20:  # 2^64 has twenty digits
        raise _Fault(f"the number {_short(digits)}", "sizes and offsets from 0 to 2^63")
    return int(digits)


def _no_number(digits: str) -> float:
    raise _Fault(f"the number {_short(digits)}", "whole numbers")


def _short(text: str) -> str:
    """A name for a message: without letters that a terminal would obey, and not too long."""
    shown = text if text.isprintable() else ascii(text)[1:-1]
    return shown if len(shown) <= 200 else f"{shown[:200]}…"


def _check(values: dict[str, Any]) -> dict[str, Entry]:
    """The entries by name, each checked by itself."""
    metadata = values.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _Fault("metadata that are no text", "names and texts", "__metadata__")
    for name in (*values, *metadata, *metadata.values()):
        try:
            name.encode("utf-8")
        except UnicodeEncodeError:
            raise _Fault("half of a surrogate pair", "text in UTF-8", _short(name)) from None
    entries = {name: _entry(_short(name), value) for name, value in values.items()}
    return dict(sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)))


def _entry(name: str, value: Any) -> Entry:
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        found = ", ".join(map(_short, value)) or "nothing" if isinstance(value, dict) else type(value).__name__
        raise _Fault(found[:200], "dtype, shape and data_offsets", name)
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise _Fault(f"the type {_short(str(dtype))}", ", ".join(BITS), name)
    for sizes in (shape, offsets):
        if not isinstance(sizes, list) or not all(type(size) is int for size in sizes):
            raise _Fault(_short(repr(sizes)[:200]), "a list of whole numbers", name)
    if len(shape) > _LONGEST_SHAPE:
        raise _Fault(f"{len(shape)} dimensions", f"at most {_LONGEST_SHAPE}", name)
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _Fault(f"data_offsets {_short(repr(offsets)[:200])}", "where its bytes begin and where they end", name)
    # Zeros count as ones: a tensor of no elements may not hide sizes that torch cannot count.
    if math.prod(max(size, 1) for size in shape) * BITS[dtype] > _BIGGEST:
        raise _Fault(f"the shape {tuple(shape)}", "fewer than 2^63 bits", name)
    bits = math.prod(shape) * BITS[dtype]
    if bits % 8 or bits // 8 != offsets[1] - offsets[0]:
        raise _Fault(f"{offsets[1] - offsets[0]} bytes", f"{bits / 8:g} bytes for {dtype} {tuple(shape)}", name)
    return Entry(dtype, tuple(shape), offsets[0], offsets[1])


def _check_bytes(entries: dict[str, Entry], size: int) -> None:
    """The tensors must lie one behind the other, without holes and without overlaps, up to the end of the file."""
    end = 0
    for name, entry in entries.items():
        if entry.begin != end:
            found = f"its bytes begin at {entry.begin}, " + (
                "in another tensor" if entry.begin < end else "after a hole"
            )
            raise _Fault(found, f"{end}, where the tensor before it ends", _short(name))
        end = entry.end
        if end > size:
            raise _Fault(f"its bytes end at {end}, the file at {size}", "bytes in the file", _short(name))
    if end != size:
        raise _Fault(f"{size - end} bytes behind the last tensor", "a file that ends with its last tensor")
