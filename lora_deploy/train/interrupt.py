"""Ctrl-C: end after the step that runs, save, and only then stop."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

__all__ = ["Interruption", "StopCallback"]

# A terminal signals the whole group and a launcher passes the signal on: one key press may come several times.
_ONE_PRESS_S = 1.0


class Interruption:
    """While it is open, the first SIGINT is noted, and a second one interrupts at once.

    Attributes:
        requested: Whether there was one.
    """

    def __init__(self) -> None:
        self.requested = False
        self._first = 0.0
        self._previous: Any = None

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.requested and time.monotonic() - self._first > _ONE_PRESS_S:
            raise KeyboardInterrupt
        if not self.requested:
            self._first = time.monotonic()
        self.requested = True

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():  # Python sets handlers in no other
            self._previous = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)


class StopCallback(TrainerCallback):
    """Ends the training with a checkpoint after a step in which any process was interrupted.

    Args:
        interruption: Of this process.

    Attributes:
        stopped: Whether the training was ended before its planned end.
    """

    def __init__(self, interruption: Interruption) -> None:
        self.interruption = interruption
        self.stopped = False

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Agree with the other processes on whether to stop; log and evaluate at the planned end."""
        if state.global_step >= state.max_steps:
            control.should_log = True
            control.should_evaluate = args.eval_strategy != "no"
        elif self._any_process(args):
            self.stopped = True
            control.should_training_stop = control.should_save = control.should_log = True
            control.should_evaluate = False
        return control

    def _any_process(self, args: TrainingArguments) -> bool:
        if args.world_size == 1:
            return self.interruption.requested
        flag = torch.tensor(int(self.interruption.requested), device=args.device)
        torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
        return bool(flag.item())
