"""Programs as processes of their own, in turns: how long each takes, and its peak memory as the kernel counted it."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

__all__ = ["Ended", "Entry", "compare", "run_process", "take_turns", "write_entries"]

# Numbers of ours beside a peer's: "ours", "peer", "ratio" (ours / peer), "unit"; a peer that there is not is None.
Entry = dict[str, float | str | None]

# The kernel hands a process' peak of memory on to what it starts, until that is larger: so a small one starts it.
_STARTER = """
import json, os, sys, time
start = time.perf_counter()
_, status, usage = os.wait4(os.posix_spawnp(sys.argv[2], sys.argv[2:], os.environ), 0)
seconds = time.perf_counter() - start
with open(sys.argv[1], "w") as file:
    code = os.waitstatus_to_exitcode(status)
    json.dump({"seconds": seconds, "peak_bytes": usage.ru_maxrss * 1024, "code": code}, file)
"""


class Ended(NamedTuple):
    """What a program took.

    Attributes:
        seconds: From its start to its end.
        peak_bytes: The most of its memory that was resident at once (VmHWM), mapped files included; of the largest
            process, where it starts others.
        output: What it printed.
    """

    seconds: float
    peak_bytes: int
    output: str


def run_process(command: Sequence[str | Path], **environment: str) -> Ended:
    """Run a program to its end.

    Args:
        command: The program and its arguments.
        **environment: Variables beside those of this process.

    Raises:
        RuntimeError: It failed; says what it printed last.
    """
    with tempfile.TemporaryDirectory() as directory:
        report = Path(directory) / "report.json"
        started = [sys.executable, "-S", "-c", _STARTER, str(report), *map(str, command)]
        ended = subprocess.run(started, capture_output=True, text=True, check=False, env=os.environ | environment)
        found = json.loads(report.read_text()) if report.is_file() else {"code": ended.returncode}
    if found["code"]:
        last = "\n".join(ended.stderr.strip().splitlines()[-5:])
        raise RuntimeError(f"{' '.join(map(str, command))} ended with {found['code']}: {last}")
    return Ended(found["seconds"], found["peak_bytes"], ended.stdout)


def take_turns(actions: Mapping[str, Callable[[], Ended]], runs: int) -> dict[str, list[Ended]]:
    """Run each of several programs so many times, one after the other in every round."""
    found: dict[str, list[Ended]] = {name: [] for name in actions}
    for _ in range(runs):
        for name, action in actions.items():
            found[name].append(action())
    return found


def compare(ours: Sequence[float], peer: Sequence[float] | None, unit: str) -> Entry:
    """Medians, and the median of the ratios of runs beside each other.

    Args:
        ours: One a run.
        peer: The other's, in the same runs; None where there is no other.
        unit: Of both.
    """
    if peer is None:
        return {"ours": statistics.median(ours), "peer": None, "ratio": None, "unit": unit}
    ratios = [own / other for own, other in zip(ours, peer, strict=True)]
    return {
        "ours": statistics.median(ours),
        "peer": statistics.median(peer),
        "ratio": statistics.median(ratios),
        "unit": unit,
    }


def write_entries(entries: Mapping[str, Entry], file: Path | None) -> None:
    """Print a line for each, and write all as JSON where a file is named."""
    for name, entry in entries.items():
        print(json.dumps({"name": name, **entry}), flush=True)
    if file is not None:
        file.write_text(json.dumps(dict(entries), indent=2) + "\n", encoding="utf-8")
