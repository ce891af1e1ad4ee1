"""The initializers of a graph, read, merged and cast one at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import onnx_ir as ir
import torch
from onnx_ir import tensor_adapters

from lora_deploy.errors import InputError
from lora_deploy.export.graph import WeightSource
from lora_deploy.export.merge import MergedParameters
from lora_deploy.export.writer import INLINE_BYTES
from lora_deploy.quantization.stored_codes import all_finite

__all__ = ["largest_first", "stream_constants", "stream_weights"]


def stream_weights(
    model: ir.Model, sources: dict[str, WeightSource], parameters: MergedParameters
) -> Iterator[tuple[str, torch.Tensor]]:
    """The values of every initializer that waits for them, in the order of the sources.

    Only one parameter is in memory at a time. It is kept for as long as the next initializer is made of the same one,
    so that a packed weight (q, k and v in one) is quantized and merged once.

    Args:
        model: The graph; tells each initializer's type and shape.
        sources: Where each initializer gets its values.
        parameters: Reads the parameters.

    Yields:
        Name of the initializer and its values, contiguous, in its type.

    Raises:
        InputError: A value is not finite in the type of the graph.
    """
    kept: tuple[tuple[str, bool], torch.Tensor] | None = None
    for name, source in sources.items():
        value = model.graph.initializers[name]
        values, row = None, 0
        for segment in source.segments:
            key = (segment.parameter, source.transposed)
            if kept is None or kept[0] != key:
                kept = None  # let go of the last one before the next is read
                kept = (key, parameters.read(segment.parameter, transposed=source.transposed))
            part = _cast(_take_rows(kept[1], segment.rows), value, segment.parameter, parameters)
            if len(source.segments) == 1:
                values = part
            else:  # layers below each other, each cast and put in its place
                if values is None:
                    assert value.shape is not None
                    values = torch.empty(tuple(value.shape.numpy()), dtype=part.dtype)
                values[row : row + len(part)] = part
                row += len(part)
        assert values is not None
        yield name, values


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


def stream_constants(model: ir.Model) -> Iterator[tuple[str, torch.Tensor]]:
    """The large constants that the graph brings itself (the tables of rotary embeddings)."""
    for name, value in model.graph.initializers.items():
        constant = value.const_value
        # An external one has been written just now.
        if constant is None or isinstance(constant, ir.ExternalTensor) or constant.nbytes < INLINE_BYTES:
            continue
        dtype = tensor_adapters.to_torch_dtype(constant.dtype)
        yield name, torch.frombuffer(bytearray(constant.tobytes()), dtype=dtype).reshape(tuple(constant.shape.numpy()))
