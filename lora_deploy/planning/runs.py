"""One run of a study: train, judge, and leave the result where a later call finds it."""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import BaseModel, ValidationError

from lora_deploy.errors import DivergenceError, OutputError
from lora_deploy.planning.held_out import HeldOut, Judgement, judge
from lora_deploy.planning.options import StudyOptions
from lora_deploy.quantization.base import TrainingBase
from lora_deploy.train import train_adapter
from lora_deploy.train.checkpoints import last_checkpoint

__all__ = ["Run", "RunResult", "do_run", "judge_base", "open_base", "open_held_out", "read_result"]

RESULT = "result.json"


class RunResult(BaseModel):
    """What came of a run.

    Attributes:
        choice: Its name.
        rank: Of the updates.
        learning_rate: The highest.
        seed: Of A and of the order of the rows.
        parameters: Trained ones, as the training counted them.
        steps: Optimizer steps.
        judgement: On the held-out rows; None where the run failed.
        seconds: Training and judging.
        error: Why it failed: a learning rate that is too high, for one.
    """

    choice: str
    rank: int
    learning_rate: float
    seed: int
    parameters: int = 0
    steps: int = 0
    judgement: Judgement | None = None
    seconds: float = 0.0
    error: str | None = None


@dataclass(frozen=True)
class Run:
    """One run that is to be done. It travels to another process, so it holds no model.

    Attributes:
        choice: Its name.
        targets: Of the choice.
        rank: Of the choice.
        learning_rate: The highest.
        seed: Of A and of the order of the rows.
        train: The rows to train on.
        held_out: The rows to judge on.
        options: Of the study.
    """

    choice: str
    targets: tuple[str, ...]
    rank: int
    learning_rate: float
    seed: int
    train: Path
    held_out: Path
    options: StudyOptions

    @property
    def directory(self) -> Path:
        """Where the adapter and the result go; the rank is in it, for a choice's rank depends on the budget."""
        name = f"{self.choice}-r{self.rank}"
        return self.options.output / "runs" / name / f"rate-{self.learning_rate:g}" / f"seed-{self.seed}"


def read_result(run: Run) -> RunResult | None:
    """What a run left if it was finished; what cannot be read is trained again."""
    try:
        return RunResult.model_validate_json((run.directory / RESULT).read_text(encoding="utf-8"))
    except (OSError, ValidationError):
        return None


def do_run(run: Run, threads: int | None = None) -> RunResult:
    """Train and judge one adapter; a run that was interrupted goes on from its last checkpoint.

    Args:
        run: What to do.
        threads: Of torch, for a process that is one of several; None to leave them.

    Returns:
        The result; it is on the disk, too, unless the training diverged.

    Raises:
        LoraDeployError: Something is wrong with the base, the data or the output.
        KeyboardInterrupt: Ctrl-C; what was trained so far is saved.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    began = time.perf_counter()
    adapter = run.directory / "adapter"
    result = RunResult(choice=run.choice, rank=run.rank, learning_rate=run.learning_rate, seed=run.seed)
    options = run.options.training(list(run.targets), run.rank, run.learning_rate, run.seed, run.train, adapter)
    goes_on = last_checkpoint(adapter) is not None
    options = options.model_copy(update={"resume": goes_on, "overwrite": not goes_on})
    try:
        trained = train_adapter(options)
    except DivergenceError as error:
        # It would diverge again; the other learning rates go on without it.
        return result.model_copy(update={"error": error.summary, "seconds": time.perf_counter() - began})
    base, held_out = _open(run.options, run.held_out)
    result = result.model_copy(
        update={
            "parameters": trained.trainable_parameters,
            "steps": trained.steps,
            "judgement": judge(base, adapter, held_out),
            "seconds": time.perf_counter() - began,
        }
    )
    _write(run.directory / RESULT, result)
    shutil.rmtree(adapter / "checkpoints", ignore_errors=True)
    return result


def judge_base(options: StudyOptions, held_out: Path, threads: int | None = None) -> Judgement:
    """The base alone on the held-out rows, once for a study."""
    if threads is not None:
        torch.set_num_threads(threads)
    file = options.output / "base.json"
    try:
        return Judgement.model_validate_json(file.read_text(encoding="utf-8"))
    except (OSError, ValidationError):
        base, rows = _open(options, held_out)
        found = judge(base, None, rows)
        _write(file, found)
        return found


def open_base(options: StudyOptions) -> TrainingBase:
    """The base as the training takes it.

    Raises:
        CheckpointError: It is missing, damaged, or quantized by another scheme.
    """
    scheme = options.training(["x"], 1, 1e-3, 0, options.data, options.output)
    base = TrainingBase(options.model, scheme.scheme(), task="causal-lm")
    if options.quantization is None and not base.prequantized:
        base.scheme = scheme.default_scheme()
    return base


def open_held_out(options: StudyOptions, base: TrainingBase, file: Path) -> HeldOut:
    """The held-out rows, tokenized as the training tokenizes.

    Raises:
        InputError: The rows or the tokenizer cannot be read.
    """
    from lora_deploy.train.loop import load_tokenizer, row_length

    length = row_length(options.max_length, base)
    tokenizer = load_tokenizer(base.directory)
    return HeldOut.load(file, tokenizer, length, chat_template=options.chat_template, answers=options.answers)


def _open(options: StudyOptions, held_out: Path) -> tuple[TrainingBase, HeldOut]:
    base = open_base(options)
    return base, open_held_out(options, base, held_out)


def _write(file: Path, values: BaseModel) -> None:
    """Whole or not at all: a result that is there was finished."""
    partial = file.with_suffix(".partial")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(values.model_dump_json(indent=2) + "\n", encoding="utf-8")
        os.replace(partial, file)
    except OSError as error:
        raise OutputError("a result could not be written", file=file, found=error.strerror or str(error)) from error
