"""The course of a training, from what lies beside an adapter: our own log, or the state of transformers' Trainer.

The files are of whoever made the adapter: they are read within bounds, and a log that cannot be read is no reason not
to export.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_deploy.errors import AdapterError, InputError
from lora_deploy.inputs.json_files import LARGEST_JSON, find_excess, parse_json
from lora_deploy.inputs.links import check_place

__all__ = ["Curve", "read_curve"]

_LOG, _STATE = "training_log.jsonl", "trainer_state.json"
_MOST = {b"{": 1_000_000, b"[": 1000, b",": 10_000_000, b'"': 20_000_000}
_LARGEST_STEP = 1 << 53


@dataclass(frozen=True)
class Curve:
    """Losses by optimizer step, in its order.

    Attributes:
        loss: Of the training.
        eval_loss: Of the evaluations.
    """

    loss: tuple[tuple[int, float], ...]
    eval_loss: tuple[tuple[int, float], ...]


def read_curve(directory: str | Path) -> Curve | None:
    """The course of the training that left an adapter.

    Args:
        directory: The adapter's.

    Returns:
        None where there is no log, or none with a loss in it.

    Raises:
        AdapterError: It cannot be read.
    """
    for name, read in ((_LOG, _read_log), (_STATE, _read_state)):
        file = Path(directory) / name
        try:
            entries = list(read(file))
        except FileNotFoundError:
            continue
        except InputError:
            raise
        except (OSError, ValueError) as error:
            raise AdapterError("the log of the training cannot be read", file=file, found=str(error)[:200]) from error
        curve = Curve(_losses(entries, "loss"), _losses(entries, "eval_loss"))
        if curve.loss or curve.eval_loss:
            return curve
    return None


def _read_log(file: Path) -> Iterable[Any]:
    """Lines of JSON, of which a training that was killed may leave the last one half."""
    check_place(file, AdapterError)
    with file.open("rb") as opened:
        raw = opened.read(LARGEST_JSON + 1)
    excess = f"more than {LARGEST_JSON} bytes" if len(raw) > LARGEST_JSON else find_excess(raw, _MOST)
    if excess:
        raise AdapterError("the log of the training is too large", file=file, found=excess)
    *lines, last = raw.decode("utf-8").split("\n")
    for line in lines:
        if line.strip():
            yield _parse(line)
    if last.strip():
        try:
            yield _parse(last)
        except ValueError:
            return


def _parse(line: str) -> Any:
    try:
        return json.loads(line)
    except RecursionError:
        raise ValueError("brackets within brackets, too many to follow") from None


def _read_state(file: Path) -> Iterable[Any]:
    state = parse_json(file, AdapterError)
    history = state.get("log_history") if isinstance(state, Mapping) else None
    if not isinstance(history, list):
        raise ValueError("it has no log_history")
    return history


def _losses(entries: Iterable[Any], name: str) -> tuple[tuple[int, float], ...]:
    """What is a number, at a step that can be one; of several at a step the last."""
    found: dict[int, float] = {}
    for entry in entries:
        step, loss = (entry.get("step"), entry.get(name)) if isinstance(entry, Mapping) else (None, None)
        if isinstance(loss, int) and not isinstance(loss, bool) and abs(loss) < _LARGEST_STEP:
            loss = float(loss)
        if type(step) is int and 0 <= step < _LARGEST_STEP and isinstance(loss, float) and math.isfinite(loss):
            found[step] = loss
    return tuple(sorted(found.items()))
