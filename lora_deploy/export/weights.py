"""The initializers of a graph, read, merged and cast a few at a time."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from functools import partial

import onnx_ir as ir
import torch
from onnx_ir import tensor_adapters

from lora_deploy.errors import InputError
from lora_deploy.export.graph import WeightSource
from lora_deploy.export.merge import MergedParameters
from lora_deploy.export.pipeline import Job, in_order
from lora_deploy.export.writer import INLINE_BYTES
from lora_deploy.quantization.stored_codes import all_finite

__all__ = ["large_constants", "largest_first", "stream_constants", "stream_weights", "table_rows"]


# A table (embedding, output head) with more values than this is read some rows at a time.
LARGE_TABLE = 1 << 24
_Key = tuple[str, bool]  # a parameter, and whether it is turned


def stream_weights(
    model: ir.Model, sources: Mapping[str, WeightSource], parameters: MergedParameters
) -> Iterator[tuple[str, torch.Tensor]]:
    """The values of every initializer that waits for them, in the order of the sources.

    A parameter is kept for as long as the next initializer is made of the same one, so that a packed weight (q, k and v
    in one) is quantized and merged once.

    Args:
        model: The graph; tells each initializer's type and shape.
        sources: Where each initializer gets its values.
        parameters: Reads the parameters, several at a time.

    Yields:
        Name of the initializer and its values, contiguous, in its type; or, of one that is put together of several
        parameters or is very large, some of its rows after the other.

    Raises:
        InputError: A value is not finite in the type of the graph.
    """
    yield from in_order(_jobs(model, sources, parameters))


def _jobs(model: ir.Model, sources: Mapping[str, WeightSource], parameters: MergedParameters) -> Iterator[Job]:
    for names in _of_one_parameter(sources):
        source = sources[names[0]]
        rows = table_rows(parameters, source)
        values = sum(math.prod(parameters.base.shapes[name]) for name, _ in dict.fromkeys(_keys(sources, names)))
        if rows:
            for part in rows:
                share = values * len(part) // rows[-1].stop
                yield Job(share, partial(_make_rows, model, names[0], source, part, parameters))
        else:
            yield Job(values, partial(_make, model, {name: sources[name] for name in names}, parameters))


def _of_one_parameter(sources: Mapping[str, WeightSource]) -> Iterator[list[str]]:
    """Neighbours of which the one begins with the parameter that the other ends with."""
    together: list[str] = []
    for name in sources:
        if together and _keys(sources, [name])[0] != _keys(sources, together)[-1]:
            yield together
            together = []
        together.append(name)
    if together:
        yield together


def _keys(sources: Mapping[str, WeightSource], names: Iterable[str]) -> list[_Key]:
    return [(segment.parameter, sources[name].transposed) for name in names for segment in sources[name].segments]


def table_rows(parameters: MergedParameters, source: WeightSource) -> list[range]:
    """The pieces in which a large table is read; none for what is read as one.

    Args:
        parameters: Reads it.
        source: Of the initializer.
    """
    (first, *others), shapes = source.segments, parameters.base.shapes
    shape = shapes[first.parameter]
    whole = not others and not source.transposed and first.rows == range(shape[0] if shape else 0)
    if not whole or math.prod(shape) <= LARGE_TABLE or not parameters.has_rows(first.parameter):
        return []
    step = max(1, LARGE_TABLE // math.prod(shape[1:]))
    return [range(start, min(start + step, shape[0])) for start in range(0, shape[0], step)]


def _make_rows(
    model: ir.Model, name: str, source: WeightSource, rows: range, parameters: MergedParameters
) -> list[tuple[str, torch.Tensor]]:
    parameter = source.segments[0].parameter
    values = parameters.read(parameter, rows=rows)
    return [(name, _cast(values, model.graph.initializers[name], parameter, parameters))]


def _make(
    model: ir.Model, sources: Mapping[str, WeightSource], parameters: MergedParameters
) -> list[tuple[str, torch.Tensor]]:
    made: list[tuple[str, torch.Tensor]] = []
    kept: tuple[_Key, torch.Tensor] | None = None
    for name, source in sources.items():
        value = model.graph.initializers[name]
        for segment in source.segments:
            key = (segment.parameter, source.transposed)
            if kept is None or kept[0] != key:
                kept = None  # let go of the last one before the next is read
                kept = (key, parameters.read(segment.parameter, transposed=source.transposed))
            made.append((name, _cast(_take_rows(kept[1], segment.rows), value, segment.parameter, parameters)))
    return made


def _take_rows(values: torch.Tensor, rows: range | tuple[int, ...]) -> torch.Tensor:
    if values.ndim == 0:
        return values
    if isinstance(rows, range):
        return values[rows.start : rows.stop]
    return values[list(rows)]


def _cast(values: torch.Tensor, target: ir.Value, parameter: str, parameters: MergedParameters) -> torch.Tensor:
    assert target.dtype is not None
    dtype = tensor_adapters.to_torch_dtype(target.dtype)
    result = values.to(dtype).contiguous()
    if dtype.is_floating_point and not all_finite(result):
        raise _too_large(values, dtype, parameter, parameters)
    return result


def _too_large(values: torch.Tensor, dtype: torch.dtype, parameter: str, parameters: MergedParameters) -> InputError:
    """Whose numbers do not fit: the base's own, or what the merge made of them."""
    base, limit = parameters.base, torch.finfo(dtype).max
    own = MergedParameters(base, None).read(parameter)
    if not all_finite(own):  # a checkpoint is read finite, a module in memory as it is
        return InputError(
            "a weight of the base is not finite",
            **base.place(parameter),
            found="NaN or infinity",
            expected="finite numbers",
            remedy="the weights are damaged: get them again",
        )
    largest = float(own.abs().max())
    expected = f"at most {limit:g}, the largest number of {str(dtype).removeprefix('torch.')}"
    remedy = "export with --precision fp32 or bf16"
    if parameters.adapter is None or not parameters.changes(parameter) or largest > limit:
        summary = "a weight is too large for the precision asked for"
        return InputError(summary, **base.place(parameter), found=f"{largest:g}", expected=expected, remedy=remedy)
    return InputError(
        "base and adapter fit the precision asked for, but the merge of the two overflows",
        file=f"{parameters.adapter.source}, merged into {base.place(parameter)['file']}",
        tensor=parameter,
        found=f"{float(values.abs().max()):g} after the merge, {largest:g} in the base",
        expected=expected,
        remedy=remedy,
    )


def largest_first(
    sources: Mapping[str, WeightSource], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, WeightSource]:
    """The sources in the order of their parameters' sizes, else in that of the graph.

    The allocator holds on to pieces of what it gave before. With the largest weights first, the peak of memory does not
    grow with the number of layers.

    Args:
        sources: Where each initializer gets its values.
        shapes: Of the parameters.
    """
    return dict(sorted(sources.items(), key=lambda item: -math.prod(shapes[item[1].segments[0].parameter])))


def large_constants(model: ir.Model) -> list[str]:
    """The names of what `stream_constants` gives: what is in no file yet."""
    found = []
    for name, value in model.graph.initializers.items():
        constant = value.const_value
        if constant is None or isinstance(constant, ir.ExternalTensor):
            continue
        if constant.nbytes >= INLINE_BYTES:
            found.append(name)
    return found


def stream_constants(model: ir.Model) -> Iterator[tuple[str, torch.Tensor]]:
    """The large constants that the graph brings itself (the tables of rotary embeddings)."""
    for name in large_constants(model):
        constant = model.graph.initializers[name].const_value
        assert constant is not None
        dtype = tensor_adapters.to_torch_dtype(constant.dtype)
        yield name, torch.frombuffer(bytearray(constant.tobytes()), dtype=dtype).reshape(tuple(constant.shape.numpy()))
