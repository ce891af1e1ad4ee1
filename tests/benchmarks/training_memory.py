"""The memory that `lora-deploy plan` estimates beside what training really takes, on a CPU.

    python -m tests.benchmarks.training_memory [--model DIR] [--budget N] [--batch 4] [--lengths 64 256]

Each choice is trained for three steps in a process of its own, on rows that all have the full length. Measured is the
most anonymous memory (no pages of files) that the kernel shows from the first step to the last, less what the
process had before it opened the base: the libraries. It is read every 2 ms; a shorter peak is missed. Loading is
over by then, and what it freed is given back to the kernel.

glibc keeps freed memory for later. So each training is measured twice: as it is, and with MALLOC_MMAP_THRESHOLD_ set,
which lets glibc give larger blocks back at once; what is measured then is what torch had allocated.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any, NamedTuple

CHOICES = ("v_proj", "attention", "all-linear")


class Measured(NamedTuple):
    """One training, in bytes: as estimated, and as measured."""

    choice: str
    length: int
    estimate: int
    measured: int


def measure(model: Path, budget: int, choice: str, batch: int, length: int, *, gives_back: bool = True) -> Measured:
    """Estimate and measure one choice.

    Args:
        model: The base.
        budget: Of the plan.
        choice: Its name.
        batch: Rows of a step.
        length: Tokens of each row.
        gives_back: Whether freed memory goes back to the kernel at once.
    """
    environment = os.environ | ({"MALLOC_MMAP_THRESHOLD_": str(1 << 17)} if gives_back else {})
    asked = json.dumps([str(model), budget, choice, batch, length])
    command = [sys.executable, "-m", __name__ if __name__ != "__main__" else "tests.benchmarks.training_memory"]
    ended = subprocess.run([*command, "--one", asked], capture_output=True, text=True, check=True, env=environment)
    return Measured(choice, length, *json.loads(ended.stdout.splitlines()[-1]))


def _one(model: str, budget: int, choice_name: str, batch: int, length: int) -> None:
    """In a process of its own: print estimate and peak."""
    import ctypes

    import matplotlib.figure  # noqa: F401 - the libraries that training imports on its way
    from transformers import TrainerCallback

    import lora_deploy.train.trainer  # noqa: F401
    from lora_deploy.planning.base import PlannedBase
    from lora_deploy.planning.choices import find_choices
    from lora_deploy.planning.cost import estimate_memory
    from lora_deploy.train import TrainOptions, loop, train_adapter

    base = PlannedBase.open(model)
    choice = next(one for one in find_choices(base.kinds, budget) if one.name == choice_name)
    estimate = estimate_memory(base, choice, batch=batch, length=length)
    sampler = _Sampler()

    class Peak(TrainerCallback):
        def on_train_begin(self, *arguments: Any, **named: Any) -> None:
            ctypes.CDLL(None).malloc_trim(0)
            sampler.start()

    real = loop.StopCallback

    class Stop(real, Peak):  # type: ignore[misc, valid-type]
        def on_train_begin(self, *arguments: Any, **named: Any) -> None:
            real.on_train_begin(self, *arguments, **named)
            Peak.on_train_begin(self, *arguments, **named)

    loop.StopCallback = Stop  # type: ignore[misc]
    with tempfile.TemporaryDirectory() as temporary:
        data = Path(temporary) / "data.jsonl"
        data.write_text((json.dumps({"text": "word " * (length + 8)}) + "\n") * (3 * batch))
        before = _memory()
        options = TrainOptions(
            model=model,
            data=data,
            output=Path(temporary) / "adapter",
            rank=choice.rank,
            target_modules=choice.targets,
            batch_size=batch,
            max_length=length,
            max_steps=3,
            device="cpu",
        )
        train_adapter(options)
    print(json.dumps([estimate.total, sampler.stop() - before]))


class _Sampler(threading.Thread):
    """Keeps the largest amount of memory that it sees."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak, self._ended = 0, threading.Event()

    def run(self) -> None:
        while not self._ended.wait(0.002):
            self.peak = max(self.peak, _memory())

    def stop(self) -> int:
        self._ended.set()
        self.join()
        return self.peak


def _memory() -> int:
    """Bytes of anonymous memory of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("the kernel does not tell RssAnon")


def main() -> None:
    """Print a line for each choice and length: estimate, measured, measured as it is, estimate / measured."""
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
                asked = (model, options.budget, choice, options.batch, length)
                exact, kept = measure(*asked), measure(*asked, gives_back=False)
                sizes = [f"{size / 1e6:,.0f} MB" for size in (exact.estimate, exact.measured, kept.measured)]
                ratio = exact.estimate / exact.measured
                print(f"| {choice} | {options.batch} x {length} | {' | '.join(sizes)} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
