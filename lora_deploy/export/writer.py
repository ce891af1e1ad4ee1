"""The weights and the graph as files: content-named data, written as it comes, and a sealed `model.onnx`."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import onnx_ir as ir
import torch

from lora_deploy.export.commit import write_failure
from lora_deploy.integrity import MODEL_NAME, SEAL_ENTRY, UNSEALED, seal_bytes

__all__ = ["INLINE_BYTES", "write_data", "write_model"]

# Page alignment lets onnxruntime map a tensor; smaller ones stay inside model.onnx, where shapes must be.
_ALIGNMENT = 4096
INLINE_BYTES = 1024
_PIECE = 1 << 24


def write_data(
    model: ir.Model,
    tensors: Iterable[tuple[str, torch.Tensor]],
    directory: Path,
    on_bytes: Callable[[int], None] = lambda count: None,
) -> str:
    """Write the initializers to a content-named data file and let the graph refer to it.

    Args:
        model: The graph; the initializers in `tensors` get their values here.
        tensors: Name and values of each; only one is in memory at a time.
        directory: Where the file goes.
        on_bytes: Is told how many bytes were written, again and again.

    Returns:
        The SHA-256 of the file.

    Raises:
        OutputError: It could not be written.
    """
    partial = directory / "weights.partial"
    digest = hashlib.sha256()
    places: dict[str, tuple[int, int]] = {}
    try:
        with open(partial, "wb") as file:
            for name, values in tensors:
                raw = values.reshape(-1).view(torch.uint8).numpy()
                value = model.graph.initializers[name]
                if raw.nbytes < INLINE_BYTES:
                    value.const_value = ir.Tensor(_in_ir(values), dtype=value.dtype, name=name)
                    continue
                padding = bytes(-file.tell() % _ALIGNMENT)
                file.write(padding)
                digest.update(padding)
                places[name] = (file.tell(), raw.nbytes)
                for start in range(0, raw.nbytes, _PIECE):
                    piece = raw[start : start + _PIECE].data
                    file.write(piece)
                    digest.update(piece)
                    on_bytes(piece.nbytes)
                del values, raw, piece  # or they would be in memory still while the next tensor is made
            file.flush()
            os.fsync(file.fileno())
        sha256 = digest.hexdigest()
        final = f"model-{sha256[:12]}.onnx.data"
        partial.rename(directory / final)
    except OSError as error:
        raise write_failure(directory, error) from error
    for name, (offset, length) in places.items():
        value = model.graph.initializers[name]
        assert value.dtype is not None
        assert value.shape is not None
        value.const_value = ir.ExternalTensor(
            final, offset, length, value.dtype, shape=value.shape, name=name, base_dir=directory
        )
    return sha256


def _in_ir(values: torch.Tensor) -> ir.TensorProtocol:
    return ir.tensor_adapters.TorchTensor(values.clone())


def write_model(model: ir.Model, directory: Path, name: str = MODEL_NAME) -> None:
    """Write a graph, which refers to the data file; `model.onnx` gets its seal.

    Raises:
        OutputError: It could not be written.
    """
    file = directory / name
    if name == MODEL_NAME:
        model.metadata_props[SEAL_ENTRY] = UNSEALED
    try:
        ir.save(model, file)
        if name == MODEL_NAME:
            file.write_bytes(seal_bytes(MODEL_NAME, file.read_bytes()))
    except OSError as error:
        raise write_failure(file, error) from error
