"""The output directory of a run: what is in it before, and the checkpoint that a run goes on from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from lora_deploy.adapter.files import WEIGHTS_NAME
from lora_deploy.adapter.record import RECORD_NAME, TrainingRecord
from lora_deploy.config import CONFIG_NAME
from lora_deploy.errors import CheckpointError, OutputError, UsageError

__all__ = [
    "CHECKPOINTS",
    "check_options",
    "check_output",
    "check_record",
    "clear_output",
    "finished_steps",
    "last_checkpoint",
    "save_options",
]

CHECKPOINTS = "checkpoints"
_OPTIONS = "training_options.json"
_STATE = "trainer_state.json"


def check_output(output: Path, *, resume: bool, overwrite: bool) -> Path | None:
    """Look at the output directory before anything is loaded.

    Returns:
        The checkpoint to go on from, with `resume`.

    Raises:
        OutputError: There is an adapter or a checkpoint in it, or it is a file.
        UsageError: There is nothing to resume.
    """
    if output.exists() and not output.is_dir():
        raise OutputError("the output is not a directory", file=output)
    checkpoint = last_checkpoint(output)
    if resume:
        if checkpoint is None:
            raise UsageError(
                f"there is no checkpoint to resume from in {output / CHECKPOINTS}", remedy="leave --resume out"
            )
        return checkpoint
    present = [name for name in (CONFIG_NAME, WEIGHTS_NAME, RECORD_NAME) if (output / name).exists()]
    if (present or checkpoint is not None) and not overwrite:
        raise OutputError(
            "the output holds a training run already",
            file=output,
            found=", ".join(present) or checkpoint,
            expected="a new or an empty directory",
            remedy="--resume to go on with it, --overwrite to replace it, or another --output",
        )
    return None


def clear_output(output: Path) -> None:
    """Make the output directory, without the checkpoints of an older run.

    Raises:
        OutputError: It cannot be written to.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        if (output / CHECKPOINTS).exists():
            shutil.rmtree(output / CHECKPOINTS)
        (output / CHECKPOINTS).mkdir()
    except OSError as error:
        raise OutputError("the output directory cannot be written to", file=output, found=str(error)) from error


def last_checkpoint(output: Path) -> Path | None:
    """The newest whole checkpoint of a run: the Trainer writes its state last, so one whose state can be read."""
    found = [path for path in (output / CHECKPOINTS).glob("checkpoint-*") if path.name.rpartition("-")[2].isdecimal()]
    newest_first = sorted(found, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)
    return next((path for path in newest_first if _is_whole(path)), None)


def _is_whole(checkpoint: Path) -> bool:
    """A process that was killed while it wrote a file leaves the file, empty or half written."""
    try:
        return all(_read(checkpoint / name) for name in (_STATE, _OPTIONS))
    except CheckpointError:
        return False


def finished_steps(checkpoint: Path) -> int | None:
    """The number of steps if the checkpoint is at the planned end of its run, else None."""
    state = _read(checkpoint / _STATE)
    return int(state["global_step"]) if state["global_step"] >= state["max_steps"] else None


def save_options(options: dict[str, Any], directory: Path) -> None:
    """Write the options that decide what is computed into a checkpoint."""
    (directory / _OPTIONS).write_text(json.dumps(options, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def check_options(options: dict[str, Any], checkpoint: Path) -> None:
    """Make sure that a run goes on with the options that it began with.

    Raises:
        UsageError: One differs, so that the run would not be the one that was interrupted.
    """
    before = _read(checkpoint / _OPTIONS)
    for name in sorted(options.keys() | before.keys()):
        if options.get(name) != before.get(name):
            raise UsageError(
                "a run can only be resumed with the options and the data that it began with",
                file=checkpoint / _OPTIONS,
                found=f"{name} = {options.get(name)!r}",
                expected=repr(before.get(name)),
                remedy="give the same command as the first time and --resume, or begin anew with --overwrite",
            )


def check_record(record: TrainingRecord, checkpoint: Path) -> None:
    """Make sure that a run goes on with the base that it began with.

    Raises:
        CheckpointError: The base has other weights, or was quantized to other codes.
    """
    before = TrainingRecord.load(checkpoint)
    if before is None:
        return
    for name in ("base_sha256", "quantization", "codes_sha256"):
        if getattr(record, name) != getattr(before, name):
            raise CheckpointError(
                "the base is not the one that the interrupted run was training on",
                file=record.base_model,
                tensor=name,
                found=getattr(record, name),
                expected=getattr(before, name),
                remedy="give the same model and quantization, or begin anew with --overwrite",
            )


def _read(file: Path) -> dict[str, Any]:
    try:
        values: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            "a checkpoint is damaged",
            file=file,
            found=str(error),
            remedy="remove its directory to go on from the one before it",
        ) from error
    return values
