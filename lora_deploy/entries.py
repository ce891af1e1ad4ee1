"""The entries of a graph's `metadata_props` that are not the manifest's, as values of their types.

Whoever wrote the file wrote them, so that each is checked where it is read, and nothing else reads them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from lora_deploy.bounds import AdapterName, Name, Sha256, first_fault
from lora_deploy.errors import CheckpointError

if TYPE_CHECKING:
    from lora_deploy.quantization import QuantizationScheme

__all__ = [
    "FILES_ENTRY",
    "recorded_adapters",
    "recorded_base",
    "recorded_calibration",
    "recorded_files",
    "recorded_scheme",
    "recorded_text",
]

_T = TypeVar("_T")
_PREFIX = "lora_deploy."
FILES_ENTRY = f"{_PREFIX}files"


class _Adapter(BaseModel):
    model_config = ConfigDict(extra="allow")

    sha256: Sha256


# Beside the graph, or among the adapters.
_FileName = Annotated[str, Field(pattern=r"^(adapters/)?[A-Za-z0-9_][A-Za-z0-9_.-]{0,250}\z")]
_ADAPTERS = TypeAdapter(dict[AdapterName, _Adapter])
_NAME = TypeAdapter(Name)
_FILES = TypeAdapter(dict[_FileName, Sha256])
_COUNTS = TypeAdapter(dict[Sha256, Annotated[int, Field(ge=0)]])


def recorded_text(entries: Mapping[str, str], name: str, file: object) -> str:
    """An entry that must be there.

    Args:
        entries: All of them.
        name: Without "lora_deploy.".
        file: The graph's, for messages.

    Raises:
        CheckpointError: It is not there.
    """
    if f"{_PREFIX}{name}" not in entries:
        raise _unreadable(file, name, "nothing")
    return entries[f"{_PREFIX}{name}"]


def recorded_base(entries: Mapping[str, str], file: object) -> str | None:
    """The hub's name of the base; None where it was a local directory.

    Raises:
        CheckpointError: It cannot be a name.
    """
    if (found := entries.get(f"{_PREFIX}base_model")) is None:
        return None
    try:
        return _NAME.validate_python(found)
    except ValidationError as error:
        raise _unreadable(file, "base_model", first_fault(error)) from error


def recorded_adapters(entries: Mapping[str, str], file: object) -> dict[str, dict[str, Any]]:
    """What the graph's adapters were made from, by name: `sha256` and what else is recorded.

    Raises:
        CheckpointError: It cannot be read, or a name cannot be one.
    """
    found = _read(_ADAPTERS, entries.get(f"{_PREFIX}adapters", "{}"), "adapters", file)
    return {name: adapter.model_dump() for name, adapter in found.items()}


def recorded_files(entries: Mapping[str, str], file: object) -> dict[str, str]:
    """The SHA-256 of every file beside the graph, by its name in the export's directory.

    Raises:
        CheckpointError: It cannot be read, or a name is no plain one.
    """
    return _read(_FILES, entries.get(FILES_ENTRY, "{}"), "files", file)


def recorded_calibration(entries: Mapping[str, str], file: object) -> dict[str, int]:
    """How many rows of each file, by its SHA-256, the rounding was calibrated on.

    Raises:
        CheckpointError: It cannot be read.
    """
    return _read(_COUNTS, entries.get(f"{_PREFIX}calibration", "{}"), "calibration", file)


def recorded_scheme(text: str, file: object) -> QuantizationScheme:
    """How the training base was quantized.

    Args:
        text: The entry, or the manifest's field.
        file: The graph's, for messages.

    Raises:
        CheckpointError: It cannot be read.
    """
    from lora_deploy.quantization import QuantizationScheme

    try:
        return QuantizationScheme.model_validate_json(text)
    except ValidationError as error:
        raise _unreadable(file, "quantization", first_fault(error)) from error


def _read(adapter: TypeAdapter[_T], text: str, name: str, file: object) -> _T:
    try:
        return adapter.validate_json(text)
    except ValidationError as error:
        raise _unreadable(file, name, first_fault(error)) from error


def _unreadable(file: object, name: str, found: str) -> CheckpointError:
    return CheckpointError(
        "what the model says of itself cannot be read",
        file=Path(str(file)),
        tensor=f"{_PREFIX}{name} of the metadata",
        found=found,
        remedy="export again",
    )
