"""The bytes of an `.onnx_adapter`, read without believing any offset, size or count in them.

The format is onnxruntime's: a flatbuffer, identifier "TORT", of this schema (core/session/lora/adapter_schema.fbs):

    table Parameter { name: string; dims: [int64]; data_type: int32; raw_data: [uint8]; }
    table Adapter { format_version: int; adapter_version: int; model_version: int; parameters: [Parameter]; }

onnxruntime 1.32 itself verifies offsets, types and sizes, but takes one of two tensors of a name without a word, as
well as any number of tensors that share the same bytes; older ones check less.
"""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_deploy.run.session import numpy_dtype

__all__ = ["MalformedAdapterError", "parse_adapter"]

_IDENTIFIER = b"TORT"
_FORMAT_VERSION = 1
# An adapter of four tensors a slot, in thousands of layers, has fewer; and names are those of layers.
_MOST_TENSORS = 100_000
_LONGEST_NAME = 1000
_MOST_DIMS = 8
_LARGEST_DIM = 1 << 31
# numpy's types by number in onnx.TensorProto.DataType; bfloat16 is ml_dtypes'.
_TYPES = {
    1: "<f4",
    2: "u1",
    3: "i1",
    4: "<u2",
    5: "<i2",
    6: "<i4",
    7: "<i8",
    10: "<f2",
    11: "<f8",
    12: "<u4",
    13: "<u8",
}
_BFLOAT16 = 16


class MalformedAdapterError(ValueError):
    """The bytes are no `.onnx_adapter`; says why."""


def parse_adapter(content: bytes) -> tuple[int, dict[str, NDArray[Any]]]:
    """Read the whole of a file.

    Args:
        content: Its bytes.

    Returns:
        The model version, and the tensors by name, each a copy.

    Raises:
        MalformedAdapterError: They are not those of an adapter.
    """
    try:
        return _parse(_Buffer(content))
    except struct.error:
        raise MalformedAdapterError("it ends before what it says it holds") from None


class _Buffer:
    """Numbers, tables and vectors of a flatbuffer. Reading past the end is a struct.error."""

    def __init__(self, content: bytes) -> None:
        self.content = content

    def number(self, kind: str, position: int) -> int:
        if position < 0:  # struct would count from the end
            raise struct.error
        return int(struct.unpack_from(f"<{kind}", self.content, position)[0])

    def follow(self, position: int) -> int:
        return position + self.number("I", position)

    def fields(self, table: int, count: int) -> list[int | None]:
        """Where the first fields of a table are; None for those it has not."""
        layout = table - self.number("i", table)
        size, length = self.number("H", layout), self.number("H", layout + 2)
        places: list[int | None] = []
        for place in range(layout + 4, layout + 4 + 2 * count, 2):
            offset = self.number("H", place) if place < layout + size else 0
            if offset and not 4 <= offset < length:
                raise MalformedAdapterError("a table of it has a field outside of itself")
            places.append(table + offset if offset else None)
        return places

    def vector(self, position: int, itemsize: int) -> tuple[int, int]:
        """Where the items of a vector begin, and how many there are, all within the file."""
        start = self.follow(position)
        count = self.number("I", start)
        if start + 4 + count * itemsize > len(self.content):
            raise struct.error
        return start + 4, count


def _parse(buffer: _Buffer) -> tuple[int, dict[str, NDArray[Any]]]:
    if buffer.content[4:8] != _IDENTIFIER:
        raise MalformedAdapterError("it does not begin as an .onnx_adapter does")
    version_at, _, model_at, tensors_at = buffer.fields(buffer.follow(0), 4)
    version = buffer.number("i", version_at) if version_at is not None else 0
    if version != _FORMAT_VERSION:
        raise MalformedAdapterError(f"its format has version {version}, not {_FORMAT_VERSION}")
    model_version = buffer.number("i", model_at) if model_at is not None else 0
    start, count = buffer.vector(tensors_at, 4) if tensors_at is not None else (0, 0)
    if count > _MOST_TENSORS:
        raise MalformedAdapterError(f"it has {count:,} tensors; at most {_MOST_TENSORS:,} can be")
    tensors: dict[str, NDArray[Any]] = {}
    left = len(buffer.content)
    for place in range(start, start + 4 * count, 4):
        name, values = _parse_tensor(buffer, buffer.follow(place), left)
        if name in tensors:
            raise MalformedAdapterError(f"it has two tensors of the name {name}")
        tensors[name] = values
        left -= values.nbytes
    return model_version, tensors


def _parse_tensor(buffer: _Buffer, table: int, left: int) -> tuple[str, NDArray[Any]]:
    """Name and values of a tensor, which are among the bytes that no other tensor had before."""
    name_at, dims_at, type_at, data_at = buffer.fields(table, 4)
    name = _parse_name(buffer, name_at)
    if dims_at is None or data_at is None:
        raise MalformedAdapterError(f"{name} has no {'shape' if dims_at is None else 'values'}")
    start, count = buffer.vector(dims_at, 8)
    if not 1 <= count <= _MOST_DIMS:
        raise MalformedAdapterError(f"{name} has {count:,} dimensions; from 1 to {_MOST_DIMS} can be")
    shape = [buffer.number("q", place) for place in range(start, start + 8 * count, 8)]
    dtype = _dtype(name, buffer.number("i", type_at) if type_at is not None else 0)
    start, size = buffer.vector(data_at, 1)
    expected = dtype.itemsize
    for dim in shape:
        expected *= dim
    # Beside a 0, any size would fit.
    if not all(0 <= dim <= _LARGEST_DIM for dim in shape) or expected != size:
        raise MalformedAdapterError(f"{name} is of shape {tuple(shape)} in {dtype}, but has {size:,} bytes")
    if size > left:
        raise MalformedAdapterError(f"{name} shares its values with another tensor")
    values = np.frombuffer(buffer.content, np.uint8, size, start).copy()
    return name, values.view(dtype).reshape(shape)


def _parse_name(buffer: _Buffer, position: int | None) -> str:
    if position is None:
        raise MalformedAdapterError("it has a tensor without a name")
    start, count = buffer.vector(position, 1)
    try:
        name = buffer.content[start : start + count].decode() if 0 < count <= _LONGEST_NAME else ""
    except UnicodeDecodeError:
        name = ""
    if not name.isprintable() or not name:
        raise MalformedAdapterError("it has a tensor whose name cannot be one")
    return name


def _dtype(name: str, number: int) -> np.dtype[Any]:
    if number == _BFLOAT16:
        return numpy_dtype("bf16")
    if number not in _TYPES:
        raise MalformedAdapterError(f"{name} is of type {number}, which no adapter is")
    return np.dtype(_TYPES[number])
