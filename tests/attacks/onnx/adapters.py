"""`.onnx_adapter` files with one lie each, written with flatbuffers, as onnxruntime writes its own."""

from __future__ import annotations

from typing import Any, NamedTuple

import flatbuffers
import numpy as np

from tests.attacks.onnx.make import INSPECT, RUN, VOCABULARY, WIDTH, A, B, Case, fingerprint

_BOTH = (RUN, INSPECT)
_RANK = 2
_FLOAT, _STRING, _BFLOAT16 = 1, 8, 16


class Parameter(NamedTuple):
    """A tensor of the file; None leaves a field out."""

    name: str | bytes | None
    dims: list[int] | None
    data_type: int
    raw: bytes | None


def build(
    parameters: list[Parameter], version: int | None = None, *, format_version: int = 1, identifier: bytes = b"TORT"
) -> bytes:
    """The bytes of a file with any parameters."""
    builder = flatbuffers.Builder(1024)
    tables = [_add(builder, parameter) for parameter in parameters]
    builder.StartVector(4, len(tables), 4)
    for table in reversed(tables):
        builder.PrependUOffsetTRelative(table)
    listed = builder.EndVector()
    builder.StartObject(4)
    builder.PrependInt32Slot(0, format_version, 0)
    builder.PrependInt32Slot(1, 1, 0)
    builder.PrependInt32Slot(2, fingerprint() if version is None else version, 0)
    builder.PrependUOffsetTRelativeSlot(3, listed, 0)
    builder.Finish(builder.EndObject(), file_identifier=identifier)
    return bytes(builder.Output())


def _add(builder: Any, parameter: Parameter) -> int:
    name = builder.CreateString(parameter.name) if parameter.name is not None else None
    raw = builder.CreateByteVector(parameter.raw) if parameter.raw is not None else None
    dims = None
    if parameter.dims is not None:
        builder.StartVector(8, len(parameter.dims), 8)
        for size in reversed(parameter.dims):
            builder.PrependInt64(size)
        dims = builder.EndVector()
    builder.StartObject(4)
    for slot, offset in ((0, name), (1, dims), (3, raw)):
        if offset is not None:
            builder.PrependUOffsetTRelativeSlot(slot, offset, 0)
    builder.PrependInt32Slot(2, parameter.data_type, 0)
    return int(builder.EndObject())


def honest() -> list[Parameter]:
    """A and B of the graph's only slot."""
    a = np.linspace(-1, 1, WIDTH * _RANK, dtype=np.float32)
    b = (np.arange(_RANK * VOCABULARY, dtype=np.int32) % 5).astype(np.float32)
    return [
        Parameter(A, [WIDTH, _RANK], _FLOAT, a.tobytes()),
        Parameter(B, [_RANK, VOCABULARY], _FLOAT, b.tobytes()),
    ]


def _with(**changes: Any) -> bytes:
    """The honest adapter with another A."""
    a, b = honest()
    return build([a._replace(**changes), b])


def cases() -> dict[str, Case]:
    """Every adapter, by name."""
    a, b = honest()
    content = build([a, b])
    nan = np.full(WIDTH * _RANK, np.nan, np.float32).tobytes()
    same = content.replace((WIDTH).to_bytes(8, "little") + (_RANK).to_bytes(8, "little"), b"\xff" * 16)
    found: dict[str, tuple[bytes, str, tuple[str, ...]]] = {
        "empty": (b"", "no byte", _BOTH),
        "garbage": (b"\xff" * 64, "no flatbuffer", _BOTH),
        "zeros": (b"\0" * 64, "offsets that all lead to themselves", _BOTH),
        "truncated": (content[:-40], "the end is missing", _BOTH),
        "identifier": (build([a, b], identifier=b"EVIL"), "another format", _BOTH),
        "format_version": (build([a, b], format_version=99), "a format of the future", _BOTH),
        "root_beyond": (b"\xf0\xff\xff\x7f" + content[4:], "a root past the end", _BOTH),
        "root_wraps": (b"\xf0\xff\xff\xff" + content[4:], "a root that wraps to before the beginning", _BOTH),
        "vtable_before": (_with_vtable(content, 1 << 30), "a table whose layout lies before the file", _BOTH),
        "vtable_itself": (_with_vtable(content, 0), "a table that is its own layout", _BOTH),
        "raw_short": (_with(raw=a.raw[:8]), "fewer values than the shape needs", _BOTH),
        "raw_long": (_with(raw=a.raw * 3), "more values than the shape needs", _BOTH),
        "raw_none": (_with(raw=None), "no values", _BOTH),
        "dims_none": (_with(dims=None), "no shape", _BOTH),
        "dims_negative": (_with(dims=[-WIDTH, -_RANK]), "two negative sizes, whose product is right", _BOTH),
        "dims_minus_one": (same, "sizes of -1, whose product is 1", _BOTH),
        "dims_giant": (_with(dims=[1 << 40, 1 << 20]), "more values than there are addresses", _BOTH),
        "dims_overflow": (_with(dims=[1 << 62, 4], raw=b""), "a product that wraps to 0", _BOTH),
        "dims_zero_times_giant": (_with(dims=[0, 1 << 62], raw=b""), "no values, of an absurd width", _BOTH),
        "dims_many": (_with(dims=[1] * 500, raw=a.raw[:4]), "five hundred dimensions", _BOTH),
        "type_none": (_with(data_type=0), "no type", _BOTH),
        "type_unknown": (_with(data_type=999), "a type that there is not", _BOTH),
        "type_negative": (_with(data_type=-1), "a negative type", _BOTH),
        "type_strings": (_with(data_type=_STRING), "bytes as pointers to texts", _BOTH),
        "name_none": (_with(name=None), "a tensor without a name", _BOTH),
        "name_empty": (_with(name=""), "a name of no letter", _BOTH),
        "name_not_utf8": (_with(name=b"\xff\xfe/lora_A"), "a name that is no text", _BOTH),
        "name_control": (_with(name="\x1b[2J/lora_A"), "a name that clears the terminal", _BOTH),
        "name_long": (_with(name="x" * 3000), "a name of 3,000 letters", _BOTH),
        "name_twice": (build([a, b, a._replace(raw=b"\0" * 32)]), "two tensors of one name", _BOTH),
        "shared_values": (_shared(), "eight tensors whose values are the same bytes", _BOTH),
        "half": (build([a]), "A without B", _BOTH),
        "ranks_differ": (_with(dims=[_RANK, WIDTH]), "ranks of A and B that differ", _BOTH),
        "nothing": (build([]), "no tensor", (RUN,)),
        "another_base": (build([a, b], fingerprint() ^ 1), "made for another base", (RUN,)),
        "another_layer": (
            build([a, b, a._replace(name="x/lora_A"), b._replace(name="x/lora_B")]),
            "one too many",
            (RUN,),
        ),
        "another_type": (_with(data_type=_BFLOAT16, raw=a.raw[:16]), "another type than the graph's", (RUN,)),
        "not_finite": (_with(raw=nan), "NaN in A", (RUN,)),
    }
    return {name: Case(*fields) for name, fields in found.items()}


def _with_vtable(content: bytes, distance: int) -> bytes:
    """The root's table says that its layout is elsewhere."""
    root = int.from_bytes(content[:4], "little")
    return content[:root] + distance.to_bytes(4, "little") + content[root + 4 :]


def _shared() -> bytes:
    """Eight tables that all point to the values of the first."""
    parameters = [Parameter(f"{number}/lora_A", [16, 8], _FLOAT, bytes([number]) * 512) for number in range(8)]
    content = bytearray(build(parameters))
    first = content.index((512).to_bytes(4, "little") + b"\0" * 512)
    for number in range(1, 8):
        own = content.index((512).to_bytes(4, "little") + bytes([number]) * 512)
        for place in range(0, len(content) - 4, 4):
            if place + int.from_bytes(content[place : place + 4], "little") == own and place < own and first > place:
                content[place : place + 4] = (first - place).to_bytes(4, "little")
    return bytes(content)
