"""Every comparison with the peers in one command: a table, a picture, and the numbers.

    python -m tests.benchmarks [--part export] [--part decode] [--part branch] [--part training] [--part startup]
        [--part deployed] [--quick] [--work DIR]

Each part is a program of its own beside this file, which takes turns with the peers and writes with `--json` what it
found: names, each with "ours", the "unit" and, where there is a peer, "peer" and the "ratio". WORK/results.json holds
that with the versions and the machine, results.md the same as a table, results.png the ratios as bars. A part that
fails is named with the end of what it printed, and the others go on; the exit code is then 1. The numbers of a part
that is not asked for stay as an earlier command left them. In full it needs some 30 GB of disk: models and exports are
kept in WORK for the next time.

--quick tries everything on SmolLM2 in little: to see that it runs, not what it gives.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from lora_deploy.bench.machine import describe_machine
from lora_deploy.demo.model import fetch_smollm2
from lora_deploy.versions import installed_versions
from tests.benchmarks.processes import Entry
from tests.benchmarks.results import Results, write_results

PACKAGES = ("lora-deploy", "torch", "transformers", "onnxruntime", "onnxruntime-gpu", "onnxruntime-genai")
PACKAGES += ("mobius-onnx", "peft", "bitsandbytes", "onnx", "onnx_ir", "numpy", "tokenizers")
_HERE = "tests.benchmarks."
PARTS = ("export", "decode", "branch", "training", "startup", "deployed")


def commands(part: str, model: Path, work: Path, quick: bool) -> list[tuple[str, ...]]:
    """The programs of a part, each a module and its arguments: exports that it needs, and what measures.

    Args:
        part: One of `PARTS`.
        model: SmolLM2.
        work: Where models and exports may be kept.
        quick: In little.
    """
    of = ("--model", str(model), "--work", str(work / part))
    peers = (f"{_HERE}export_peers", "--work", str(work))
    int4, nf4 = work / "startup" / "int4", work / "startup" / "nf4"
    made = ("--quantization", "nf4", "--no-verify", "--overwrite", "--model", str(model), "--output")
    full: dict[str, list[tuple[str, ...]]] = {
        "export": [
            (*peers, "--shape", "1.1b"),
            (*peers, "--shape", "8b", "--precisions", "int4", "--runs", "1"),
            (f"{_HERE}export_memory", "--quantization", "nf4"),
        ],
        "decode": [(f"{_HERE}int4_speed", "--model", str(model))],
        "branch": [(f"{_HERE}branch", "--part", "cost", "--part", "pool", *of)],
        "deployed": [(f"{_HERE}deployed", *of)],
        "training": [(f"{_HERE}training", "--model", str(model))],
        "startup": [
            ("lora_deploy", "export", "--merge", "--precision", "int4", "--calibration-rows", "0", *made, str(int4)),
            ("lora_deploy", "export", "--branch", *made, str(nf4)),
            (f"{_HERE}startup", "--model", str(int4), "--model", str(nf4)),
        ],
    }
    if not quick:
        return full[part]
    little = {
        "export": ("--shape", "smollm2", "--runs", "1"),
        "decode": ("--bursts", "3", "--restarts", "1"),
        "branch": ("--rounds", "1"),
        "deployed": ("--seeds", "0", "--answers", "4", "--only", "fp16"),
        "training": ("--rounds", "1", "--steps", "1"),
        "startup": ("--runs", "1"),
    }
    if part == "export":
        return [(*peers, *little[part])]
    return [*full[part][:-1], (*full[part][-1], *little[part])]


def run_part(part: str, model: Path, work: Path, quick: bool) -> dict[str, Entry]:
    """What a part found, by name.

    Raises:
        RuntimeError: One of its programs failed.
    """
    entries: dict[str, Entry] = {}
    for module, *arguments in commands(part, model, work, quick):
        measures = module.startswith(_HERE)
        file = work / f"{module.removeprefix(_HERE)}.json"
        file.unlink(missing_ok=True)
        command = [sys.executable, "-m", module, *arguments, *(["--json", str(file)] if measures else ["--quiet"])]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        if ended.returncode or (measures and not file.is_file()):
            said = (ended.stderr.strip() or ended.stdout.strip()).splitlines()[-3:]
            raise RuntimeError(f"{' '.join(command[1:])} ended with {ended.returncode}: {' / '.join(said)}")
        if measures:
            found = json.loads(file.read_text(encoding="utf-8"))
            entries |= {name: {"peer": None, "ratio": None, **entry} for name, entry in found.items()}
    return entries


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts and write what they found after each; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", action="append", choices=PARTS, help="may be repeated; all of them by default")
    parser.add_argument("--quick", action="store_true", help="SmolLM2 only, single runs")
    parser.add_argument("--work", type=Path, default=Path("benchmarks"), help="models, exports and results")
    asked = parser.parse_args(arguments)
    asked.work.mkdir(parents=True, exist_ok=True)
    model = fetch_smollm2(asked.work / "smollm2")
    results = Results.read(asked.work)
    results.versions = {"python": platform.python_version(), **installed_versions(*PACKAGES)}
    results.machine = describe_machine()
    failed = False
    for part in asked.part or PARTS:
        start = time.perf_counter()
        try:
            results.parts[part] = run_part(part, model, asked.work, asked.quick)
        except RuntimeError as error:
            failed = True
            print(f"{part}: {error}", file=sys.stderr)
        else:
            print(f"{part}: {len(results.parts[part])} comparisons, {time.perf_counter() - start:,.0f} s", flush=True)
        write_results(results, asked.work)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
