"""The entries of a graph's `metadata_props` that are not the manifest's, as values of their types.

Whoever wrote the file wrote them, so that each is checked where it is read, and nothing else reads them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from lora_deploy.bounds import AdapterName, Sha256, first_fault
from lora_deploy.errors import CheckpointError

if TYPE_CHECKING:
    from lora_deploy.quantization import QuantizationScheme

__all__ = [
    "recorded_adapters",
    "recorded_calibration",
    "recorded_data",
    "recorded_parts",
    "recorded_scheme",
    "recorded_text",
]

_T = TypeVar("_T")
_PREFIX = "lora_deploy."


class _Adapter(BaseModel):
    model_config = ConfigDict(extra="allow")

    source: str
    sha256: Sha256


_PartName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_-]{0,199}\.onnx\z")]
_ADAPTERS = TypeAdapter(dict[AdapterName, _Adapter])
_PARTS = TypeAdapter(dict[_PartName, Sha256])
_COUNTS = TypeAdapter(dict[str, Annotated[int, Field(ge=0)]])
_SHA256 = TypeAdapter(Sha256)


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


def recorded_adapters(entries: Mapping[str, str], file: object) -> dict[str, dict[str, Any]]:
    """What the graph's adapters were made from, by name: `source`, `sha256` and what else is recorded.

    Raises:
        CheckpointError: It cannot be read, or a name cannot be one.
    """
    found = _read(_ADAPTERS, entries.get(f"{_PREFIX}adapters", "{}"), "adapters", file)
    return {name: adapter.model_dump() for name, adapter in found.items()}


def recorded_parts(entries: Mapping[str, str], file: object) -> dict[str, str]:
    """The SHA-256 of each further graph of the export, by the name of its file beside this one.

    Raises:
        CheckpointError: It cannot be read, or a name is no plain one.
    """
    return _read(_PARTS, entries.get(f"{_PREFIX}parts", "{}"), "parts", file)


def recorded_data(entries: Mapping[str, str], file: object) -> str:
    """The SHA-256 of the weights, which the name of their file is made of.

    Raises:
        CheckpointError: There is none, or it cannot be one.
    """
    text = recorded_text(entries, "data_sha256", file)
    try:
        return _SHA256.validate_python(text)
    except ValidationError as error:
        raise _unreadable(file, "data_sha256", repr(text[:100])) from error


def recorded_calibration(entries: Mapping[str, str], file: object) -> dict[str, int]:
    """How many rows of each file the rounding was calibrated on.

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
