"""Where this user's models, adapters and data lie, by the hash of what they are.

An export says what it was made of, by hashes; a path in it would make the same export different on each machine, and
tell strangers of the machine. So the paths are remembered here, for `verify` and `adapter convert`: a convenience
that may be deleted at any time.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path

__all__ = ["cache_directory", "find_place", "remember_place"]

# Of each thing: copies come and go.
_REMEMBERED, _SEPARATOR = 8, "\0"
_SHA256 = re.compile(r"[0-9a-f]{64}")


def cache_directory() -> Path:
    """`$XDG_CACHE_HOME/lora-deploy`, or `~/.cache/lora-deploy`; it need not be there."""
    # The XDG specification: a relative path is invalid, and ignored.
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "lora-deploy"


def remember_place(sha256: str, place: str | Path) -> None:
    """Note where something lies; where that cannot be noted, nothing happens.

    Args:
        sha256: Of the base, the adapter or the data, as the export records it.
        place: Its directory, or the file.
    """
    place = Path(place).absolute()
    if not _SHA256.fullmatch(sha256) or not place.exists():
        return
    with suppress(OSError, RuntimeError):  # no home, no room, not ours to write
        file = cache_directory() / "places" / sha256
        known = [place, *(other for other in _read(file) if other != place)][:_REMEMBERED]
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(f".{sha256}.{os.getpid()}")
        partial.write_text(_SEPARATOR.join(map(str, known)), encoding="utf-8", errors="surrogateescape")
        partial.replace(file)


def find_place(sha256: str) -> Path | None:
    """Where it was when it was exported last, if something is still there. What it is must be checked."""
    if not _SHA256.fullmatch(sha256):
        return None
    with suppress(OSError, RuntimeError):
        return next((place for place in _read(cache_directory() / "places" / sha256) if place.exists()), None)
    return None


def _read(file: Path) -> list[Path]:
    try:
        text = file.read_text(encoding="utf-8", errors="surrogateescape")
    except FileNotFoundError:
        return []
    return [Path(place) for place in text.split(_SEPARATOR) if os.path.isabs(place)]
