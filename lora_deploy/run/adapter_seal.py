"""The seal of an `.onnx_adapter`: 32 bits of its own SHA-256, in the place of the adapter's version.

An adapter may be converted when its export is long done, so that no other file can say what it must be. onnxruntime's
format has no field for a hash; its "adapter version", which is the user's to choose, has 32 bits. They find every
flipped bit and all but one in four thousand million other changes. They are no signature.
"""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path

from lora_deploy.errors import AdapterError

__all__ = ["UNSEALED_VERSION", "check_sealed", "seal_adapter"]

# The version that a file has before it is sealed; 0 would be left out of it.
UNSEALED_VERSION = 1
# The field of the schema's root table: format version, adapter version, model version, parameters.
_FIELD = 1


def seal_adapter(file: Path) -> None:
    """Put the seal into a file that has just been written with `UNSEALED_VERSION`."""
    content = bytearray(file.read_bytes())
    place = _place(content)
    content[place : place + 4] = hashlib.sha256(content).digest()[:4]
    file.write_bytes(content)


def check_sealed(file: Path) -> None:
    """Make sure that an adapter is as it was written.

    Raises:
        AdapterError: It is not, or has no seal.
    """
    content = bytearray(file.read_bytes())
    try:
        place = _place(content)
        seal, content[place : place + 4] = content[place : place + 4], struct.pack("<i", UNSEALED_VERSION)
    except (struct.error, IndexError):
        seal = bytearray()
    if seal != hashlib.sha256(content).digest()[:4]:
        raise AdapterError(
            "the adapter is damaged, or lora-deploy did not write it",
            file=file,
            expected="the bytes that its own seal is of",
            remedy="make it again with lora-deploy adapter convert",
        )


def _place(content: bytearray) -> int:
    """Where the version is, by the rules of flatbuffers."""
    (table,) = struct.unpack_from("<I", content, 0)
    (back,) = struct.unpack_from("<i", content, table)
    (offset,) = struct.unpack_from("<H", content, table - back + 4 + 2 * _FIELD)
    if not offset or table + offset + 4 > len(content):
        raise IndexError
    return int(table + offset)
