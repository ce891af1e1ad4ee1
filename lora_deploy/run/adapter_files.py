"""`.onnx_adapter` files: read, and checked against the graph that they are for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_deploy.errors import AdapterError
from lora_deploy.manifest import Manifest
from lora_deploy.run.adapter_format import MalformedAdapterError, parse_adapter
from lora_deploy.run.interface import first_line
from lora_deploy.run.session import numpy_dtype
from lora_deploy.slots import Slot

__all__ = ["Tensors", "read_onnx_adapter", "read_tensors"]

# What holds A and B of every slot, by the name of the input.
Tensors = dict[str, NDArray[Any]]

_REMEDY = "make it again with lora-deploy adapter convert"


def read_tensors(file: Path) -> tuple[int, Tensors]:
    """Read what an `.onnx_adapter` holds, whatever graph it is for.

    Args:
        file: The `.onnx_adapter`.

    Returns:
        Its model version, and its tensors by name.

    Raises:
        AdapterError: It is missing or damaged.
    """
    if not file.is_file():
        raise AdapterError("there is no such adapter", file=file, remedy="make it with lora-deploy adapter convert")
    try:
        return parse_adapter(file.read_bytes())
    except (OSError, MalformedAdapterError) as error:
        raise AdapterError(
            "the adapter cannot be read",
            file=file,
            found=first_line(error),
            expected="an .onnx_adapter file",
            remedy=_REMEDY,
        ) from error


def read_onnx_adapter(file: Path, manifest: Manifest) -> Tensors:
    """Read an adapter and make sure that it is one for this graph.

    onnxruntime itself would run on without a word where a layer is missing, and has no idea which base an adapter is
    for: the shapes are the same in every fine-tune of a model.

    Args:
        file: The `.onnx_adapter`.
        manifest: The graph's.

    Returns:
        A and B of every slot: in the type of the computation, or as int8 codes and float32 scales.

    Raises:
        AdapterError: It cannot be read, is for another base or graph, or is damaged.
    """
    version, found = read_tensors(file)
    _check_storage(file, found, manifest.slots)
    if version != manifest.fingerprint:
        raise AdapterError(
            "the adapter was made for another base or another graph",
            file=file,
            found=f"model version {version}",
            expected=f"{manifest.fingerprint}, which stands for the base, the slots and the type of this graph",
            remedy="make it for this one with lora-deploy adapter convert",
        )
    _check_names(file, set(found), manifest.slots)
    dtype = numpy_dtype(manifest.compute_dtype)
    for slot in manifest.slots:
        _check_slot(file, slot, [found[name] for name in slot.input_names], dtype)
    return {name: found[name] for slot in manifest.slots for name in slot.input_names}


def _check_storage(file: Path, found: Tensors, slots: Sequence[Slot]) -> None:
    """The other kind of file is told by its names alone, before the version that does not fit either."""
    kinds = {True: "A and B as int8 codes with scales", False: "A and B as floats"}
    other = {name.endswith(("_codes", "_scales")) for name in found}
    own = {slot.int8_blocks is not None for slot in slots}
    if len(other) == len(own) == 1 and other != own:
        raise AdapterError(
            "the adapter is stored in another way than this graph takes it",
            file=file,
            found=kinds[other.pop()],
            expected=kinds[own.pop()],
            remedy="make it for this graph with lora-deploy adapter convert",
        )


def _check_names(file: Path, found: set[str], slots: Sequence[Slot]) -> None:
    expected = {name for slot in slots for name in slot.input_names}
    for slot in slots:
        missing = [name for name in slot.input_names if name not in found]
        if missing:
            parts = len(slot.input_names)
            some = "one half" if parts == 2 else f"{parts - len(missing)} of {parts} tensors"
            of_each = "A and B" if parts == 2 else "codes and scales of A and B"
            raise AdapterError(
                f"the adapter has only {some} of an update" if len(missing) < parts else "the adapter lacks a layer",
                file=file,
                tensor=missing[0],
                expected=f"{of_each} of every slot, of rank 0 where the adapter changes nothing",
                remedy=_REMEDY,
            )
    for name in sorted(found - expected):
        raise AdapterError("the adapter has a layer that the graph does not have", file=file, tensor=name)


def _check_slot(file: Path, slot: Slot, arrays: Sequence[NDArray[Any]], dtype: np.dtype[Any]) -> None:
    """Shapes, types and values of what holds one update."""
    first = arrays[0]
    shapes = slot.input_shapes(first.shape[-1] if first.ndim else 0)
    int8 = slot.int8_blocks is not None
    types: list[np.dtype[Any]] = [np.dtype(np.int8), np.dtype(np.float32)] * 2 if int8 else [dtype] * 2
    if [(array.shape, array.dtype) for array in arrays] != list(zip(shapes, types, strict=True)):
        raise AdapterError(
            "an update of the adapter does not fit its slot",
            file=file,
            tensor=slot.name,
            found=_describe([array.shape for array in arrays], [array.dtype for array in arrays]),
            expected=_describe(slot.input_shapes("r"), types),
            remedy=_REMEDY,
        )
    floats = arrays[1::2] if int8 else arrays
    if not all(np.isfinite(array.astype(np.float32)).all() for array in floats):
        raise AdapterError("the adapter holds NaN or infinity", file=file, tensor=slot.name)
    if int8 and any((array == -128).any() for array in arrays[::2]):
        raise AdapterError(
            "the adapter holds a code that quantization never gives",
            file=file,
            tensor=slot.name,
            found=-128,
            expected="-127 to 127",
            remedy=_REMEDY,
        )


def _describe(shapes: Sequence[tuple[object, ...]], types: Sequence[np.dtype[Any]]) -> str:
    labels = ("A", "B") if len(shapes) == 2 else ("A codes", "A scales", "B codes", "B scales")
    parts = []
    for label, shape, dtype in zip(labels, shapes, types, strict=True):
        parts.append(f"{label} ({', '.join(map(str, shape))}) {dtype}")
    return ", ".join(parts)
