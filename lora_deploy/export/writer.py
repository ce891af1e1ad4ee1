"""The weights and the graph as files: content-named data, written as it comes, and a sealed `model.onnx`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path

import onnx_ir as ir
import torch

from lora_deploy.errors import OutputError
from lora_deploy.export.commit import write_failure
from lora_deploy.export.data_file import DataFile
from lora_deploy.integrity import MODEL_NAME, SEAL_ENTRY, UNSEALED, seal_bytes

__all__ = ["INLINE_BYTES", "LARGEST_GRAPH", "data_name", "write_data", "write_model"]

# Page alignment lets onnxruntime map a tensor; smaller ones stay inside model.onnx, where shapes must be.
_ALIGNMENT = 4096
INLINE_BYTES = 1024
LARGEST_GRAPH = (1 << 31) - 1  # bytes of a protobuf message


def write_data(
    model: ir.Model,
    tensors: Iterable[tuple[str, torch.Tensor]],
    directory: Path,
    on_bytes: Callable[[int], None] = lambda count: None,
) -> str | None:
    """Write the initializers to a content-named data file and let the graph refer to it.

    Args:
        model: The graph; the initializers in `tensors` get their values here.
        tensors: Name and values of each, contiguous; or, under the same name, parts of them one after the other.
        directory: Where the file goes.
        on_bytes: Is told how many bytes were written, again and again.

    Returns:
        The SHA-256 of the file; None where all of them are small, so that there is none.

    Raises:
        OutputError: It could not be written.
    """
    partial = directory / "weights.partial"
    places: dict[str, tuple[int, int]] = {}
    inline: dict[str, list[torch.Tensor]] = {}
    try:
        with DataFile(partial) as file:
            for name, values in tensors:
                value = model.graph.initializers[name]
                if _bytes(value) < INLINE_BYTES:
                    inline.setdefault(name, []).append(values.clone())
                    continue
                if name not in places:
                    places[name] = (file.align(_ALIGNMENT), 0)
                offset, length = places[name]
                places[name] = (offset, length + file.write(values, on_bytes))
                del values  # or it would be in memory still while the next tensor is made
            sha256 = file.finish()
        final = data_name(sha256)
        if places:
            partial.rename(directory / final)
        else:
            partial.unlink()
    except OSError as error:
        raise write_failure(directory, error) from error
    for name, parts in inline.items():
        value = model.graph.initializers[name]
        joined = torch.cat([part.reshape(-1) for part in parts]).view(_shape(value))
        value.const_value = ir.Tensor(ir.tensor_adapters.TorchTensor(joined), dtype=value.dtype, name=name)
    for name, (offset, length) in places.items():
        value = model.graph.initializers[name]
        assert value.dtype is not None
        assert value.shape is not None
        value.const_value = ir.ExternalTensor(
            final, offset, length, value.dtype, shape=value.shape, name=name, base_dir=directory
        )
    return sha256 if places else None


def data_name(sha256: str) -> str:
    """The name of a data file.

    Args:
        sha256: Of its content.
    """
    return f"model-{sha256[:12]}.onnx.data"


def _shape(value: ir.Value) -> tuple[int, ...]:
    assert value.shape is not None
    return tuple(value.shape.numpy())


def _bytes(value: ir.Value) -> int:
    assert value.dtype is not None
    return math.ceil(value.dtype.itemsize * math.prod(_shape(value)))


def _check_size(model: ir.Model, file: Path) -> None:
    """What is in the graph itself, and not in the data file, must fit into one message."""
    inline = {
        name: value.const_value.nbytes
        for name, value in model.graph.initializers.items()
        if value.const_value is not None and not isinstance(value.const_value, ir.ExternalTensor)
    }
    size = sum(inline.values())
    if size <= LARGEST_GRAPH:  # or else there is no use in making the message
        size = ir.to_proto(model).ByteSize()
    if size > LARGEST_GRAPH:
        largest = max(inline, key=lambda name: inline[name], default=None)
        raise OutputError(
            "the graph is larger than a file of its format can be",
            file=file,
            tensor=largest,
            found=f"{size} bytes without the data file, {inline.get(largest or '', 0)} of them in this tensor",
            expected=f"at most {LARGEST_GRAPH}",
            remedy="export fewer layers or adapters together",
        )


def write_model(model: ir.Model, directory: Path, name: str = MODEL_NAME) -> None:
    """Write a graph, which refers to the data file; `model.onnx` gets its seal.

    Raises:
        OutputError: It could not be written, or holds more than a file of its format can.
    """
    file = directory / name
    _check_size(model, file)
    if name == MODEL_NAME:
        model.metadata_props[SEAL_ENTRY] = UNSEALED
    try:
        ir.save(model, file)
        if name == MODEL_NAME:
            file.write_bytes(seal_bytes(MODEL_NAME, file.read_bytes()))
    except OSError as error:
        raise write_failure(file, error) from error
