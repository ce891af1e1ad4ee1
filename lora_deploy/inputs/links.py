"""Where a file of a model or an adapter may be: in its directory, or in the hub's cache where that put a link."""

from __future__ import annotations

import stat
from pathlib import Path

from lora_deploy.errors import InputError

__all__ = ["check_place"]


def check_place(file: Path, error: type[InputError]) -> None:
    """Refuse a link that leads out of the file's directory, and what is no file.

    A downloaded directory may hold links, and a link can name any file of this machine, which would then be read, and
    copied into an export. The hub's cache keeps files under their hashes, `blobs/<hash>`, and links to them:
    `snapshots/<revision>/model.safetensors -> ../../blobs/<hash>`.

    Args:
        file: The file.
        error: Raised where it is refused.

    Raises:
        InputError: Of the kind of `error`.
        FileNotFoundError: There is no such file, or the link leads nowhere.
    """
    try:
        if not stat.S_ISREG(file.stat().st_mode):
            raise error("this is no file", file=file, found="a directory or a device", expected="a file")
        if not file.is_symlink():
            return
        target, directory = file.resolve(strict=True), file.parent.resolve()
    except FileNotFoundError:
        raise
    except (OSError, RuntimeError, ValueError) as cause:  # a loop of links is a RuntimeError before Python 3.13
        raise error("a file cannot be read", file=file, found=str(cause), expected="a file") from cause
    if directory in target.parents or _blobs(directory) == target.parent:
        return
    raise error(
        "a file of the model or the adapter is a link that leads out of its directory",
        file=file,
        found=target,
        expected=f"a file in {directory}, or a link into the hub's cache that it is in",
        remedy="if you trust it, put a copy of the file in the place of the link",
    )


def _blobs(directory: Path) -> Path | None:
    """Where the hub's cache keeps the files of a snapshot; None for a directory that is none."""
    parents = (directory, *directory.parents)
    snapshot = next((place for place in parents if place.parent.name == "snapshots"), None)
    return snapshot.parent.parent / "blobs" if snapshot is not None else None
