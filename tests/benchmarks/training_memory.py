"""The memory that `lora-deploy plan` estimates beside what training really takes, on a CPU.

    python -m tests.benchmarks.training_memory [--model DIR] [--budget N] [--batch 4] [--lengths 64 256]

Each choice is trained for two steps in a process of its own, on rows that all have the full length. Measured is the
kernel's peak of resident memory from the first step to the last, less what the process had before it opened the base:
the libraries. Loading, which is over by then, is not in it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

CHOICES = ("v_proj", "attention", "all-linear")


class Measured(NamedTuple):
    """One training, in bytes."""

    choice: str
    length: int
    estimate: int
    measured: int


def measure(model: Path, budget: int, choice: str, batch: int, length: int) -> Measured:
    """Estimate and measure one choice.

    Args:
        model: The base.
        budget: Of the plan.
        choice: Its name.
        batch: Rows of a step.
        length: Tokens of each row.
    """
    asked = json.dumps([str(model), budget, choice, batch, length])
    command = [sys.executable, "-m", __name__ if __name__ != "__main__" else "tests.benchmarks.training_memory"]
    ended = subprocess.run([*command, "--one", asked], capture_output=True, text=True, check=True)
    return Measured(choice, length, *json.loads(ended.stdout.splitlines()[-1]))


def _one(model: str, budget: int, choice_name: str, batch: int, length: int) -> None:
    """In a process of its own: print estimate and peak."""
    from transformers import TrainerCallback

    from lora_deploy.planning.base import PlannedBase
    from lora_deploy.planning.choices import find_choices
    from lora_deploy.planning.cost import estimate_memory
    from lora_deploy.train import TrainOptions, loop, train_adapter

    base = PlannedBase.open(model)
    choice = next(one for one in find_choices(base.kinds, budget) if one.name == choice_name)
    estimate = estimate_memory(base, choice, batch=batch, length=length)
    peaks: list[int] = []

    class Peak(TrainerCallback):
        def on_train_begin(self, *arguments: Any, **named: Any) -> None:
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew

        def on_train_end(self, *arguments: Any, **named: Any) -> None:
            peaks.append(_memory("VmHWM"))

    real = loop.StopCallback

    class Stop(real, Peak):  # type: ignore[misc, valid-type]
        def on_train_begin(self, *arguments: Any, **named: Any) -> None:
            real.on_train_begin(self, *arguments, **named)
            Peak.on_train_begin(self, *arguments, **named)

    loop.StopCallback = Stop  # type: ignore[misc]
    with tempfile.TemporaryDirectory() as temporary:
        data = Path(temporary) / "data.jsonl"
        data.write_text((json.dumps({"text": "word " * (length + 8)}) + "\n") * (2 * batch))
        before = _memory("VmRSS")
        options = TrainOptions(
            model=model,
            data=data,
            output=Path(temporary) / "adapter",
            rank=choice.rank,
            target_modules=choice.targets,
            batch_size=batch,
            max_length=length,
            max_steps=2,
            device="cpu",
        )
        train_adapter(options)
    print(json.dumps([estimate.total, peaks[0] - before]))


def _memory(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"the kernel does not tell {name}")


def main() -> None:
    """Print a line for each choice and length."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path)
    parser.add_argument("--budget", type=int, default=921_600)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--one")
    options = parser.parse_args()
    if options.one:
        _one(*json.loads(options.one))
        return
    with tempfile.TemporaryDirectory() as temporary:
        from lora_deploy.demo.model import fetch_smollm2

        model = options.model or fetch_smollm2(Path(temporary) / "model")
        for length in options.lengths:
            for choice in CHOICES:
                found = measure(model, options.budget, choice, options.batch, length)
                ratio = found.estimate / found.measured
                sizes = f"estimate {found.estimate / 1e6:,.0f} MB | measured {found.measured / 1e6:,.0f} MB"
                print(f"| {choice} | {options.batch} x {length} | {sizes} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
