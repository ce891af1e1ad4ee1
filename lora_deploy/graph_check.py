"""An ONNX graph from a stranger: read, and held to what an export looks like, before anything believes it.

onnxruntime 1.32 refuses most lies by itself. It does not refuse external data in `model.onnx` itself, a location that
is cut at a NUL, or functions that call one another twice each, 24 deep, on which it works for hours; and onnx_ir,
which reads weights for `verify` and for expanded weights, follows any location. What is read here is read once: no
weights, no more than the graph itself.
"""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lora_deploy.errors import CheckpointError

__all__ = ["check_graph", "metadata_of", "read_graph"]

# protobuf's own limit.
_MOST_BYTES = (1 << 31) - 1
# No size of an array is larger; products of two of them stay far from where 64 bits overflow.
_MOST_VALUES = 1 << 40
# Of an input, where the sizes that the graph leaves open are one: heads times their width, or an image.
_MOST_INPUT = 1 << 28
# Calls of functions, written out: a graph of ours has none.
_MOST_NODES = 1_000_000

# Bits of a value, by onnx.TensorProto.DataType.
_BITS = {1: 32, 2: 8, 3: 8, 4: 16, 5: 16, 6: 32, 7: 64, 9: 8, 10: 16, 11: 64, 12: 32, 13: 64, 14: 64, 15: 128, 16: 16}
_BITS |= {17: 8, 18: 8, 19: 8, 20: 8, 21: 4, 22: 4, 23: 4, 24: 8, 25: 2, 26: 2}
# Which field holds values that raw_data does not, and how many of its entries are one; the others are in int32_data.
_FIELDS = {1: ("float_data", 1), 7: ("int64_data", 1), 8: ("string_data", 1), 11: ("double_data", 1)}
_FIELDS |= {12: ("uint64_data", 1), 13: ("uint64_data", 1), 14: ("float_data", 2), 15: ("double_data", 2)}
_STRING = 8
_EXTERNAL = 1  # onnx.TensorProto.EXTERNAL
_REMEDY = "get the export again from where it came from, and do not run it if it is a stranger's"


def read_graph(file: str | Path) -> Any:
    """Read a graph and make sure that it refers to nothing but its own weights.

    Args:
        file: The `.onnx` file.

    Returns:
        The onnx.ModelProto, without its external weights.

    Raises:
        CheckpointError: There is none, it is damaged, or it is hostile.
    """
    import onnx

    file = Path(file)
    try:
        state = os.stat(file)
    except (OSError, ValueError):
        state = None
    if state is None or not stat.S_ISREG(state.st_mode):
        raise CheckpointError("there is no exported model", file=file, remedy="make one with lora-deploy export")
    if state.st_size > _MOST_BYTES:
        raise CheckpointError(
            "the exported model is damaged",
            file=file,
            found=f"{state.st_size:,} bytes",
            expected=f"at most {_MOST_BYTES:,}, which is all that the format can hold",
            remedy="export again",
        )
    try:
        model = onnx.ModelProto.FromString(file.read_bytes())
        check_graph(model, file)
    except CheckpointError:
        raise
    except Exception as error:  # protobuf's own, texts that are not UTF-8, and functions nested too deep for Python
        found = str(error).strip() or type(error).__name__
        raise CheckpointError("the exported model is damaged", file=file, found=found, remedy="export again") from error
    return model


def metadata_of(model: Any, file: Path) -> dict[str, str]:
    """The `metadata_props` of a graph.

    Args:
        model: The onnx.ModelProto.
        file: Where it was read, for messages.

    Raises:
        CheckpointError: They are no texts, or a name is there twice.
    """
    entries = {entry.key: entry.value for entry in model.metadata_props}
    texts = all(isinstance(text, str) for text in (*entries, *entries.values()))  # protobuf gives bytes for others
    if not texts or len(entries) < len(model.metadata_props):
        found = "an entry of the metadata that is there twice" if texts else "metadata that is not UTF-8"
        raise CheckpointError("the exported model is damaged", file=file, found=found, remedy="export again")
    return entries


def check_graph(model: Any, file: Path) -> None:
    """Hold a graph to what it may refer to, and to sizes that can be.

    Args:
        model: The onnx.ModelProto.
        file: Where it was read; its external weights are beside it.

    Raises:
        CheckpointError: It has no graph; a tensor's values are elsewhere, or are not those of its shape; an input has
            absurd sizes; or functions call each other without end.
    """
    if not model.HasField("graph"):
        raise CheckpointError("the exported model is damaged", file=file, found="no graph", remedy="export again")
    sizes: dict[str, int] = {}
    for graph in _graphs(model):
        names = Counter(tensor.name for tensor in graph.initializer)
        if names and (most := names.most_common(1)[0])[1] > 1:
            raise _hostile(file, most[0], f"{most[1]} tensors of one name", "each once")
        for tensor in _tensors(graph):
            _check_tensor(tensor, file, sizes)
    for value in (*model.graph.input, *model.graph.output):
        if not isinstance(value.name, str) or not value.name:
            raise _hostile(file, value.name, "an input or output without a name that can be read", "a name in UTF-8")
    for value in model.graph.input:
        _check_input(value, file)
    for function in model.functions:
        for tensor in _attribute_tensors(function.node):
            _check_tensor(tensor, file, sizes)
    _check_functions(model, file)


def _graphs(model: Any) -> Iterator[Any]:
    """The graph and all that are inside of its nodes, and of functions; protobuf itself limits how deep."""
    waiting = [model.graph]
    waiting += _inner_graphs(node for function in model.functions for node in function.node)
    while waiting:
        graph = waiting.pop()
        yield graph
        waiting += _inner_graphs(graph.node)


def _inner_graphs(nodes: Iterable[Any]) -> list[Any]:
    found = []
    for node in nodes:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                found.append(attribute.g)
            found.extend(attribute.graphs)
    return found


def _tensors(graph: Any) -> Iterator[Any]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    yield from _attribute_tensors(graph.node)


def _attribute_tensors(nodes: Iterable[Any]) -> Iterator[Any]:
    for node in nodes:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            for sparse in (
                *attribute.sparse_tensors,
                *([attribute.sparse_tensor] * attribute.HasField("sparse_tensor")),
            ):
                yield from (sparse.values, sparse.indices)


def _check_tensor(tensor: Any, file: Path, sizes: dict[str, int]) -> None:
    """Its values are where they may be, and as many as its shape says."""
    values = _count(tensor.name, tensor.dims, file)
    if tensor.data_type != _STRING and tensor.data_type not in _BITS:
        raise _hostile(file, tensor.name, f"type {tensor.data_type}", "a type of ONNX")
    if tensor.data_location == _EXTERNAL or tensor.external_data:
        _check_external(tensor, values, file, sizes)
        return
    if tensor.data_type == _STRING or not tensor.HasField("raw_data"):
        field, packed = _FIELDS.get(tensor.data_type, ("int32_data", 1))
        bits = _BITS.get(tensor.data_type, 8)
        unit, found, expected = "values", len(getattr(tensor, field)), -(-values * packed * min(bits, 8) // 8)
    else:
        unit, found, expected = "bytes", len(tensor.raw_data), _bytes(values, tensor.data_type)
    if found != expected:
        raise _hostile(file, tensor.name, f"{found:,} {unit}", f"{expected:,}, those of {_shape(tensor.dims)}")


def _count(name: str, dims: Sequence[int], file: Path) -> int:
    """How many values a shape has."""
    count = bound = 1
    for size in dims:
        count, bound = count * size, bound * max(size, 1)
        if size < 0 or bound > _MOST_VALUES:
            raise _hostile(
                file, name, f"a shape of {_shape(dims)}", f"sizes from 0, of at most {_MOST_VALUES:,} values"
            )
    return count


def _bytes(values: int, data_type: int) -> int:
    return -(-values * _BITS[data_type] // 8)


def _check_external(tensor: Any, values: int, file: Path, sizes: dict[str, int]) -> None:
    """The values are a stretch of a plain file beside the graph, as long as dtype and shape need."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    size = _size_beside(tensor.name, location if isinstance(location, str) else repr(location), file, sizes)
    if tensor.data_type == _STRING:
        raise _hostile(file, tensor.name, "texts in another file", "numbers")
    expected = _bytes(values, tensor.data_type)
    offset = _whole_number(entries.get("offset", "0"))
    length = _whole_number(entries.get("length", str(expected)))
    if offset is None or length is None:
        found = f"offset {entries.get('offset', 'none')[:40]!r}, length {entries.get('length', 'none')[:40]!r}"
        raise _hostile(file, tensor.name, found, "whole numbers from 0")
    if length != expected:
        raise _hostile(file, tensor.name, f"{length:,} bytes", f"{expected:,}, those of {_shape(tensor.dims)}")
    if offset + length > size:
        raise CheckpointError(
            "the weights of the export are damaged: their file ends too early",
            file=file.parent / location,
            tensor=_printable(tensor.name),
            found=f"{size:,} bytes",
            expected=f"bytes {offset:,} to {offset + length:,} for this tensor",
            remedy="export again",
        )


def _size_beside(name: str, location: str, file: Path, sizes: dict[str, int]) -> int:
    """How long a file beside the graph is, after it has been found to be one."""
    if location in sizes:
        return sizes[location]
    plain = location not in ("", ".", "..") and not any(sign in location for sign in "/\\:\0") and len(location) < 256
    if not plain or location == file.name:
        raise _hostile(file, name, f"values in {location[:100]!r}", "values in a file of weights beside the graph")
    place = file.parent / location
    try:
        state = os.stat(place)
        inside = place.resolve(strict=True).parent == file.parent.resolve()
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: links in a circle
        raise CheckpointError(
            "the weights of the export are missing", file=place, tensor=name, remedy="export again"
        ) from error
    if not inside or not stat.S_ISREG(state.st_mode):
        found = "a link out of its directory" if not inside else "no plain file"
        raise _hostile(file, name, f"values in {location!r}, {found}", "values in a file of weights beside the graph")
    sizes[location] = state.st_size
    return state.st_size


def _whole_number(text: str) -> int | None:
    return int(text) if len(text) <= 19 and text.isascii() and text.isdigit() else None


def _check_input(value: Any, file: Path) -> None:
    """An input that must be filled, an empty cache for one, has no size that fills the memory."""
    sizes = [dim.dim_value for dim in value.type.tensor_type.shape.dim if dim.HasField("dim_value")]
    count = 1
    for size in sizes:
        count *= max(size, 1)
        if size < 0 or count > _MOST_INPUT:
            expected = f"sizes from 0, of at most {_MOST_INPUT:,} values"
            raise _hostile(file, value.name, f"an input of {_shape(sizes)}", expected)


def _check_functions(model: Any, file: Path) -> None:
    """Written out, functions are no more nodes than a graph can have; none calls itself."""
    functions = {(function.domain, function.name): function for function in model.functions}
    written: dict[tuple[str, str], int] = {}

    def count(nodes: Iterable[Any], above: tuple[tuple[str, str], ...]) -> int:
        total = 0
        for node in nodes:
            key = (node.domain, node.op_type)
            total += 1
            total += sum(count(graph.node, above) for graph in _inner_graphs([node]))
            if key in functions:
                if key in above or len(above) > 100:
                    raise _hostile(file, node.op_type, "functions that call each other without end", "none")
                if key not in written:
                    written[key] = count(functions[key].node, (*above, key))
                total += written[key]
            if total > _MOST_NODES:
                raise _hostile(file, node.op_type, f"over {_MOST_NODES:,} nodes, written out", "fewer")
        return total

    count(model.graph.node, ())


def _shape(dims: Iterable[int]) -> str:
    listed = list(dims)
    return f"({', '.join(map(str, listed[:8]))}{', …' if len(listed) > 8 else ''})"


def _printable(name: str | bytes) -> str:
    """protobuf gives bytes for a text that is not UTF-8; and a terminal obeys control characters."""
    return name[:200] if isinstance(name, str) and name.isprintable() else repr(name[:200])


def _hostile(file: Path, tensor: str, found: object, expected: object) -> CheckpointError:
    return CheckpointError(
        "the graph of the export is damaged or hostile",
        file=file,
        tensor=_printable(tensor) or "one without a name",
        found=found,
        expected=expected,
        remedy=_REMEDY,
    )
