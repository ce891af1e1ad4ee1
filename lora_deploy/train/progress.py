"""What a run shows and leaves of its course: a progress bar, the log as JSON lines, the loss curve."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging as transformers_logging

from lora_deploy.errors import OutputError

__all__ = [
    "LOG_NAME",
    "PLOT_NAME",
    "LogCallback",
    "ProgressCallback",
    "draw_loss",
    "log_lines",
    "quiet_libraries",
    "write_log",
]

LOG_NAME = "training_log.jsonl"
PLOT_NAME = "loss.png"

_FIELDS = ("step", "epoch", "loss", "eval_loss", "learning_rate", "grad_norm", "tokens_per_second")


def log_lines(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines of the log from the Trainer's history: those that hold a training or an evaluation loss."""
    return [
        {name: entry[name] for name in _FIELDS if name in entry}
        for entry in history
        if "loss" in entry or "eval_loss" in entry
    ]


def write_log(file: Path, lines: list[dict[str, Any]], mode: str = "w") -> None:
    """Write lines of the log, or with mode "a" add them.

    Raises:
        OutputError: It could not be written.
    """
    try:
        with file.open(mode, encoding="utf-8") as log:
            log.writelines(json.dumps(line) + "\n" for line in lines)
    except OSError as error:
        raise OutputError("the training log could not be written", file=file, found=str(error)) from error


class LogCallback(TrainerCallback):
    """Writes `training_log.jsonl` as the training goes; a resumed run keeps the lines up to its checkpoint.

    Args:
        file: The log. Only the main process writes it.
    """

    def __init__(self, file: Path) -> None:
        self.file = file

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin the file anew with what the checkpoint knows."""
        self._write(state, "w", log_lines(state.log_history))

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add the newest line."""
        self._write(state, "a", log_lines(state.log_history[-1:]))

    def _write(self, state: TrainerState, mode: str, lines: list[dict[str, Any]]) -> None:
        if state.is_world_process_zero:
            write_log(self.file, lines, mode)


class ProgressCallback(TrainerCallback):
    """A progress bar with loss and tokens/s, on the main process.

    Args:
        console: Where it is drawn; a quiet one draws nothing.
    """

    def __init__(self, console: Console) -> None:
        self.bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeElapsedColumn(),
            TextColumn("eta"),
            TimeRemainingColumn(),
            console=console,
            disable=console.quiet,
        )
        self.task = self.bar.add_task("training", numbers="")
        self._numbers: dict[str, str] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Show the bar, at the step of the checkpoint if there is one."""
        if state.is_world_process_zero:
            self.bar.update(self.task, total=state.max_steps, completed=state.global_step)
            self.bar.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Move the bar."""
        self.bar.update(self.task, completed=state.global_step)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Show the newest numbers."""
        for line in log_lines(state.log_history[-1:]):
            if "loss" in line:
                self._numbers["loss"] = f"loss {line['loss']:.4f}"
                self._numbers["speed"] = f"{line.get('tokens_per_second', 0):,.0f} tokens/s"
            if "eval_loss" in line:
                self._numbers["eval"] = f"eval {line['eval_loss']:.4f}"
        order = ("loss", "eval", "speed")
        self.bar.update(self.task, numbers="  ".join(self._numbers[name] for name in order if name in self._numbers))

    def stop(self) -> None:
        """Take the bar down, also after an error."""
        self.bar.stop()


def draw_loss(history: list[dict[str, Any]], file: Path) -> None:
    """Draw the training and the evaluation loss over the steps as PNG.

    Args:
        history: The Trainer's.
        file: Where it goes.

    Raises:
        OutputError: It could not be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, label, style in (("loss", "training", "-"), ("eval_loss", "evaluation", "o-")):
        points = [(line["step"], line[name]) for line in log_lines(history) if name in line]
        if points:
            # A line of one point is invisible without a mark.
            axes.plot(*zip(*points, strict=True), style if len(points) > 1 else "o", label=label, markersize=4)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    try:
        partial = file.with_suffix(".png.partial")
        figure.savefig(partial, format="png", metadata={"Software": None})
        partial.replace(file)
    except OSError as error:
        raise OutputError("the loss curve could not be written", file=file, found=str(error)) from error


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep the libraries' hints and bars off the user's screen; errors stay."""
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    noisy = [logging.getLogger(name) for name in ("accelerate", "bitsandbytes", "torch.distributed")]
    levels = [logger.level for logger in noisy]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
        transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        for logger in noisy:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            transformers_logging.set_verbosity(verbosity)
            if bars:
                transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]
            for logger, level in zip(noisy, levels, strict=True):
                logger.setLevel(level)
