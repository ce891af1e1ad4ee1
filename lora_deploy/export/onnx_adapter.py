"""`.onnx_adapter` files: an adapter as onnxruntime takes it, for one graph."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from lora_deploy.adapter import LoraAdapter, TrainingRecord, read_adapter
from lora_deploy.adapter.packing import check_slots, pack_slots
from lora_deploy.entries import recorded_scheme
from lora_deploy.errors import AdapterError, OutputError, UsageError
from lora_deploy.export.commit import locked, sync
from lora_deploy.export.merge import drop_copies, open_base
from lora_deploy.integrity import base_key
from lora_deploy.manifest import ADAPTER_DIRECTORY, ADAPTER_SUFFIX, Manifest, read_metadata
from lora_deploy.places import find_place
from lora_deploy.run.adapter_seal import UNSEALED_VERSION, seal_adapter
from lora_deploy.run.session import host_ortvalue, import_onnxruntime, numpy_dtype

__all__ = ["check_name", "convert_adapter", "write_onnx_adapter"]

# As long as the name of a file can be, with what is put around it.
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}")


def check_name(name: str) -> None:
    """Make sure that an adapter can be called this: it becomes a file's name.

    Raises:
        UsageError: It cannot.
    """
    if not _NAME.fullmatch(name):
        raise UsageError(
            "this cannot be the name of an adapter",
            found=name,
            expected="at most 200 letters, digits, dots, _ and -, a letter, a digit or _ first",
            remedy="give it another name: --adapter NAME=DIR, or adapter convert --name NAME",
        )


def convert_adapter(
    adapter: str | Path, directory: str | Path, name: str | None = None, *, overwrite: bool = False
) -> Path:
    """Make an adapter available in an export that is there; nothing of the export changes.

    Args:
        adapter: Its directory, in PEFT's format.
        directory: The export, with hot-swap slots.
        name: Of the adapter; None for its directory's.
        overwrite: Replace an adapter of this name.

    Returns:
        The file.

    Raises:
        UsageError: The export has no slots, or the name cannot be one.
        InputError: Export or adapter are damaged, do not fit each other, or the adapter was trained on another base.
        OutputError: There is such an adapter, or it could not be written.
    """
    directory = Path(directory)
    manifest = Manifest.load(directory)
    if manifest.branch != "hot-swap":
        raise UsageError(
            "this export takes no adapters",
            found=f"{directory}, of kind {manifest.branch or 'merged'}",
            expected="an export made with --branch, without --fixed and --pool",
        )
    name = Path(adapter).resolve().name if name is None else name
    check_name(name)
    file = directory / ADAPTER_DIRECTORY / f"{name}{ADAPTER_SUFFIX}"
    if file.exists() and not overwrite:
        raise OutputError(
            "the export has an adapter of this name", file=file, remedy="choose another --name, or add --overwrite"
        )
    lora = read_adapter(adapter, lazy=True)
    record = TrainingRecord.load(adapter)
    if record is not None and record.base_sha256 != manifest.base_sha256:
        raise AdapterError(
            "the adapter was trained on another base than the export's",
            file=adapter,
            found=f"sha256 {record.base_sha256[:16]}… ({record.base_model})",
            expected=f"sha256 {manifest.base_sha256[:16]}…",
            remedy="export its own base with --branch",
        )
    graph = directory / "model.onnx"
    quantization = recorded_scheme(manifest.quantization, graph)
    if record is not None and record.quantization != quantization:
        raise AdapterError(
            "the adapter was trained on another quantization of the base than the export's",
            file=adapter,
            found=record.quantization,
            expected=quantization,
            remedy="export the base as it was trained on with --branch",
        )
    if lora.parameters and (place := find_place(base_key(read_metadata(directory)))) is not None:
        lora = drop_copies(lora, open_base(place, quantization, [lora]))
    with locked(directory):
        if Manifest.load(directory).fingerprint != manifest.fingerprint:
            raise AdapterError("the export was replaced meanwhile", file=directory, remedy="convert again")
        return write_onnx_adapter(lora, manifest, directory, name)


def write_onnx_adapter(adapter: LoraAdapter, manifest: Manifest, directory: str | Path, name: str) -> Path:
    """Write an adapter for a graph with slots.

    Every slot gets its A and B, of rank 0 where the adapter changes nothing, so that a file that lacks one is known to
    be damaged. The model version is the manifest's fingerprint: the file format has no other place for the base's hash.

    Args:
        adapter: What to write.
        manifest: The graph's.
        directory: The export; the file goes into its "adapters".
        name: Of the file.

    Returns:
        The file.

    Raises:
        AdapterError: The graph has no place for all that the adapter changes.
        OutputError: It could not be written.
    """
    check_slots(manifest.slots, adapter)
    onnxruntime = import_onnxruntime()
    tensors = pack_slots(manifest.slots, adapter, manifest.compute_dtype)
    file = Path(directory) / ADAPTER_DIRECTORY / f"{name}{ADAPTER_SUFFIX}"
    partial = file.with_name(f".{file.name}.partial")
    container = onnxruntime.AdapterFormat()
    container.set_adapter_version(UNSEALED_VERSION)
    container.set_model_version(manifest.fingerprint)
    # Kept until the file is written: the container has no share in the memory of what it is given.
    parameters = {key: _to_ortvalue(values) for key, values in tensors}
    container.set_parameters(parameters)
    try:
        file.parent.mkdir(exist_ok=True)
        container.export_adapter(str(partial))
        seal_adapter(partial)
        sync(partial)
        partial.replace(file)
    except BaseException as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
            file.parent.rmdir()  # if it is empty, it was made just now
        if isinstance(error, (OSError, RuntimeError)):  # the latter is what onnxruntime makes of a full disk
            raise OutputError("the adapter could not be written", file=file, found=str(error)) from error
        raise
    with suppress(OSError):  # it is there, whatever a loss of power may bring back
        sync(file.parent)
    return file


def _to_ortvalue(values: torch.Tensor) -> Any:
    if values.dtype == torch.bfloat16:
        return host_ortvalue(values.view(torch.int16).numpy().view(numpy_dtype("bf16")))
    return host_ortvalue(values.contiguous().numpy())
