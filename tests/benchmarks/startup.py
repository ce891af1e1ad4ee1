"""Seconds from Enter to the first piece of text, and to the help.

    python -m tests.benchmarks.startup --model EXPORT [--model EXPORT ...] [--runs 5] [--json FILE]

Each run is a process of its own, and all take turns: `lora-deploy --help` until it ends, and `lora-deploy run` until
the first byte of the answer. An export whose weights lora-deploy's own kernels can compute is run that way as well
(`--weights native`). What is printed is the median of each, and the least. One run before warms the file cache and
compiles the kernels.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from lora_deploy.manifest import Manifest
from lora_deploy.terminal import make_console

_COMMAND = [sys.executable, "-m", "lora_deploy"]
_PROMPT = "What is the capital of France?"


def main() -> None:
    """Measure, print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, action="append", required=True, help="what export wrote; may be repeated")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the medians there too")
    asked = parser.parse_args()
    found = measure(commands_of(asked.model), asked.runs)
    if asked.json:
        medians = {name: {"ours": values["median"], "unit": "s"} for name, values in found.items()}
        asked.json.write_text(json.dumps(medians, indent=2))
    make_console().print_json(json.dumps(found))


def commands_of(exports: list[Path]) -> dict[str, list[str]]:
    """What is run, by name."""
    commands = {"--help": ["--help"]}
    for export in exports:
        run = ["run", str(export), "--prompt", _PROMPT, "--max-new-tokens", "8"]
        commands[f"run {export.name}"] = run
        manifest = Manifest.load(export)
        if any(weight.operator == "MatMulBnb4" for weight in manifest.coded):
            commands[f"run {export.name} --weights native"] = [*run, "--weights", "native"]
    return commands


def measure(commands: dict[str, list[str]], runs: int) -> dict[str, dict[str, float]]:
    """Median and least seconds of each.

    Args:
        commands: Arguments of `lora-deploy`, by name.
        runs: Of each, after one that does not count.
    """
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for number in range(runs + 1):
        for name, arguments in commands.items():
            taken = first_output(arguments)
            if number:
                seconds[name].append(taken)
    return {
        name: {"median": round(statistics.median(values), 3), "least": round(min(values), 3)}
        for name, values in seconds.items()
    }


def first_output(arguments: list[str]) -> float:
    """Seconds until a process has written its first byte; of the help, which comes at once, until it has ended."""
    start = time.perf_counter()
    with subprocess.Popen([*_COMMAND, *arguments], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        first = process.stdout.read(1)
        taken = time.perf_counter() - start
        process.stdout.read()
    if process.returncode or not first:
        raise SystemExit(f"lora-deploy {' '.join(arguments)} ended with {process.returncode}")
    return time.perf_counter() - start if arguments == ["--help"] else taken


if __name__ == "__main__":
    main()
