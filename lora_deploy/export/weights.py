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
            part = _cast(_take_rows(kept[1], segment.rows), value, name, parameters)
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


def _cast(values: torch.Tensor, target: ir.Value, name: str, parameters: MergedParameters) -> torch.Tensor:
    assert target.dtype is not None
    dtype = tensor_adapters.to_torch_dtype(target.dtype)
    result = values.to(dtype).contiguous()
    if dtype.is_floating_point and not _all_finite(result):
        overflow = bool(torch.isfinite(values).all())
        raise InputError(
            "a weight is too large for the precision asked for" if overflow else "a weight of the base is not finite",
            file=parameters.base.directory,
            tensor=name,
            found=f"{values.abs().max().item():g}" if overflow else "NaN or infinity",
            expected=f"at most {torch.finfo(dtype).max:g}" if overflow else "finite numbers",
            remedy="export with --precision fp32 or bf16" if overflow else "the checkpoint is damaged: get it again",
        )
    return result


def _all_finite(values: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite. A finite sum says so in one pass; else look at each.

    In pieces, for torch turns all it sums into float32 first.
    """
    for piece in torch.split(values.reshape(-1), 1 << 20):
        if not bool(torch.isfinite(piece.sum(dtype=torch.float32))) and not bool(torch.isfinite(piece).all()):
            return False
    return True


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
