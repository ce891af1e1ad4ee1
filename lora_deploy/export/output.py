"""Whether an export can be written where it is asked for: what is there, and how much room there is."""

from __future__ import annotations

import shutil
from pathlib import Path

from lora_deploy.errors import OutputError
from lora_deploy.export.commit import write_failure
from lora_deploy.integrity import MODEL_NAME, OWN_PATTERN

__all__ = ["check_output", "check_space"]

# Beside what is counted: configuration, tokenizer, directories.
_ROOM = 32 << 20


def check_output(output: str | Path, overwrite: bool, inputs: list[Path]) -> Path:
    """The directory to write, if it is new or may be replaced, and is none of the inputs; raises OutputError."""
    output = Path(output)
    try:
        if output.is_symlink():
            output = output.resolve()
        _check_output(output, overwrite, inputs)
    except OSError as error:
        raise OutputError("the output cannot be used", file=output, found=error.strerror or str(error)) from error
    return output


def _check_output(output: Path, overwrite: bool, inputs: list[Path]) -> None:
    if any(path.is_dir() and path.resolve() == output.resolve() for path in inputs):
        raise OutputError(
            "the output is the directory of the model or the adapter", file=output, remedy="choose another --output"
        )
    if output.exists() and not output.is_dir():
        raise OutputError("the output is a file", file=output, expected="a directory that is new or empty")
    is_export = (output / MODEL_NAME).exists()
    there_is = output.is_dir() and any(not path.match(OWN_PATTERN) for path in output.iterdir())
    if there_is and not (overwrite and is_export):
        there = "an export" if is_export else "other files"
        raise OutputError(
            "the output exists",
            file=output,
            found=there,
            expected="a directory that is new or empty",
            remedy="choose another --output" + (", or add --overwrite" if is_export else ""),
        )


def check_space(staging: Path, needed: int) -> None:
    """Make sure that there is room, before the first byte.

    Args:
        staging: On the file system that is written to.
        needed: Bytes.

    Raises:
        OutputError: There is not.
    """
    try:
        free = shutil.disk_usage(staging).free
    except OSError as error:
        raise write_failure(staging, error) from error
    if free < needed + _ROOM:
        raise OutputError(
            "there is not enough room for the export",
            file=staging.parent,
            found=f"{free / 1e6:,.0f} MB free",
            expected=f"{(needed + _ROOM) / 1e6:,.0f} MB; an export that is replaced goes only afterwards",
            remedy="make room or choose another --output; nothing was changed",
        )
