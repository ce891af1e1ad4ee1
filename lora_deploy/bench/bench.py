"""Samples of an export, each measured by a process of its own, so that nothing is warm and memory is only its own."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from collections.abc import Callable

from lora_deploy import errors
from lora_deploy.bench.machine import describe_machine
from lora_deploy.bench.measure import Sample
from lora_deploy.bench.options import BenchOptions
from lora_deploy.bench.report import Benchmark, Measure, Unit
from lora_deploy.errors import LoraDeployError
from lora_deploy.versions import installed_versions

__all__ = ["run_benchmark"]

_UNITS: dict[str, Unit] = {
    "prefill": "tokens/s",
    "decode": "tokens/s",
    "decode_bare": "tokens/s",
    "decode_switching": "tokens/s",
    "pooled": "tokens/s",
    "singly": "tokens/s",
    "texts": "texts/s",
    "texts_in_batch": "texts/s",
}
_PACKAGES = ("lora-deploy", "onnxruntime", "onnxruntime-gpu", "onnx_ir", "numpy")


def run_benchmark(options: BenchOptions, on_progress: Callable[[str, int, int], None] | None = None) -> Benchmark:
    """Measure an export in as many processes as there are runs, one after the other.

    Args:
        options: What to measure.
        on_progress: Told of each run: a name, how many are done, how many there are.

    Raises:
        CheckpointError: There is no export, or it cannot run.
        AdapterError: An adapter cannot be read or is not one for the export.
        UsageError: The options do not go with the export, the machine or each other.
    """
    samples = []
    for run in range(options.runs):
        if on_progress is not None:
            on_progress("measuring", run, options.runs)
        samples.append(_sample(options))
    if on_progress is not None:
        on_progress("measuring", options.runs, options.runs)
    first = samples[0]
    measures = {
        name: Measure.of_seconds(
            [sample.bursts[name].seconds for sample in samples], _UNITS.get(name, "s"), burst.count
        )
        for name, burst in first.bursts.items()
    }
    measures |= {name: Measure.of_bytes([sample.memory[name] for sample in samples]) for name in first.memory}
    return Benchmark(
        directory=str(options.directory),
        task=first.task,
        branch=first.branch,
        precision=first.precision,
        provider=options.provider,
        weights=options.weights,
        threads=options.threads,
        adapters=first.adapters,
        prompt_tokens=first.prompt_tokens,
        tokens=first.tokens,
        runs=options.runs,
        measures=measures,
        versions={"python": platform.python_version(), **installed_versions(*_PACKAGES)},
        machine=describe_machine(),
    )


def _sample(options: BenchOptions) -> Sample:
    """Let another process measure; an error there is raised here."""
    ended = subprocess.run(
        [sys.executable, "-m", "lora_deploy.bench.child"],
        input=options.model_dump_json(),
        capture_output=True,
        text=True,
        check=False,
    )
    lines = ended.stdout.splitlines()
    if ended.returncode or not lines:
        raise LoraDeployError(
            "the process that measures ended early",
            file=options.directory,
            found=(ended.stderr.strip().splitlines() or [f"exit code {ended.returncode}"])[-1],
        )
    found = json.loads(lines[-1])
    if "error" in found:
        raise getattr(errors, found["error"])(found["summary"], **found["details"])
    return Sample(**found)
