"""A short training run that is broken off and resumed, as often as a test asks for it."""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.faults.forks import ANY, Ended, Fault, Faulty, Running
from tests.train.conftest import calls, write_jsonl

__all__ = ["STEPS", "Training"]

STEPS = 4
_RESULT = ("adapter_model.safetensors", "adapter_config.json")


class Training:
    """`lora-deploy train` with a checkpoint after each step.

    Args:
        base: To train on.
        root: An empty directory.
        faulty: Runs the command.

    Attributes:
        place: The parent of the output.
        output: The output.
        expected: The adapter's files after an undisturbed run.
        calls: Its calls that change files.
    """

    def __init__(self, base: Path, root: Path, faulty: Faulty) -> None:
        self.place, self.output, self.faulty = root / "place", root / "place" / "adapter", faulty
        data = write_jsonl(root / "data.jsonl", calls())
        self._asked = ["train", "--model", base, "--data", data, "--output", self.output, "--device", "cpu", "--quiet"]
        self._asked += ["--rank", "4", "--dropout", "0.2", "--batch-size", "2", "--gradient-accumulation", "2"]
        self._asked += ["--max-steps", STEPS, "--save-steps", "1", "--learning-rate", "0.01"]
        self.reset()
        undisturbed = self.run()
        assert undisturbed.code == 0, undisturbed.err
        self.expected, self.calls = self.result(), undisturbed.calls

    def reset(self) -> None:
        """Nothing is there."""
        shutil.rmtree(self.place, ignore_errors=True)
        self.place.mkdir()

    def start(self, *more: object, k: int = 0, mode: str = "once", error: int = 0, kinds: int = ANY) -> Running:
        """Start it with a fault in the place of the output."""
        return self.faulty.start(*self._asked, *more, arm=Fault(self.place, k, mode, error, kinds))

    def run(self, *more: object, k: int = 0, mode: str = "once", error: int = 0, kinds: int = ANY) -> Ended:
        """The same, until it has ended."""
        return self.start(*more, k=k, mode=mode, error=error, kinds=kinds).wait()

    def result(self) -> list[bytes | None]:
        """The adapter's files."""
        files = [self.output / name for name in _RESULT]
        return [file.read_bytes() if file.is_file() else None for file in files]

    def goes_on(self) -> str:
        """Resume the run, or begin it anew where there is no checkpoint; what is wrong then, or nothing."""
        ended = self.run("--resume")
        if ended.code == 2 and "no checkpoint to resume from" in ended.err:
            ended = self.run("--overwrite")
        if ended.code != 0:
            return f"exit {ended.code}: {ended.err}"
        return "" if self.result() == self.expected else "other weights"
