"""Configurations with one value replaced by an absurd one, each planned in a process that cannot take much memory."""

from __future__ import annotations

import json
import os
import resource
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lora_deploy.errors import LoraDeployError
from lora_deploy.export.plan import plan_export
from lora_deploy.quantization.base import TrainingBase

__all__ = ["ABSURD", "REFUSED", "Change", "changed", "changes", "plan_each"]

Change = tuple[tuple[str, ...], Any]

ABSURD: tuple[Any, ...] = (10**9, 10**12, 10**30, -1, 0, "1", "x", [], [1], {}, {"a": 1}, None, True, 1.5, -(10**12))
REFUSED = "refused"
_ROOM = 3 << 30  # of addresses, beyond those that the process has; libraries reserve more than they use
_MEMORY = 1 << 20  # kB that may be used, beyond those that the process had


def changes(config: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[Change]:
    """Every field of a configuration, nested ones too, with every absurd value."""
    for key, value in config.items():
        for absurd in ABSURD:
            yield (*path, key), absurd
        if isinstance(value, dict):
            yield from changes(value, (*path, key))


def changed(config: dict[str, Any], change: Change) -> dict[str, Any]:
    """A copy of a configuration with one value replaced."""
    copy: dict[str, Any] = json.loads(json.dumps(config))
    (*path, last), value = change
    inner = copy
    for key in path:
        inner = inner[key]
    inner[last] = value
    return copy


def plan_each(directory: Path, asked: list[Change], *, whole: bool = True) -> list[str]:
    """Plan an export of each changed configuration, in a process of its own whose memory is limited.

    Args:
        directory: Of the model; its configuration is written anew for each.
        asked: What is changed.
        whole: Make the graph too. What is traced takes seconds each.

    Returns:
        For each: "planned", "refused", or what else was raised or used.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            _plan_all(directory, asked, whole, writing)
            status = 0
        finally:
            os._exit(status)
    os.close(writing)
    with os.fdopen(reading) as opened:
        found = [json.loads(line) for line in opened]
    _, status = os.waitpid(child, 0)
    if len(found) < len(asked):
        found.append(f"the process ended with {status}")
    return found + ["not tried"] * (len(asked) - len(found))


def _plan_all(directory: Path, asked: list[Change], whole: bool, writing: int) -> None:
    config = json.loads((directory / "config.json").read_text())
    pages = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (pages + _ROOM, pages + _ROOM))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for change in asked:
        (directory / "config.json").write_text(json.dumps(changed(config, change)))
        try:
            if whole:
                plan_export(directory, None, directory.parent / "output", quantization="auto")
            else:
                TrainingBase(directory)
            found = "planned"
        except LoraDeployError as error:
            found = REFUSED if error.exit_code == 3 else f"exit code {error.exit_code}"
        except BaseException as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            found = f"{type(error).__name__}: {error} ({place.filename}:{place.lineno})"[:300]
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        if used - peak > _MEMORY:
            found, peak = f"{(used - peak) >> 10} MB used, then {found}", used
        os.write(writing, (json.dumps(found) + "\n").encode())
