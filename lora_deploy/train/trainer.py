"""transformers' Trainer, saving and loading only the adapter, with its own data order, evaluation and numbers."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Sampler
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from lora_deploy.adapter import TrainingRecord, load_adapter, save_adapter
from lora_deploy.data.examples import IGNORED
from lora_deploy.errors import DivergenceError, OutputError
from lora_deploy.train.batches import EpochSampler, Row, Rows, collate_packed, collate_padded
from lora_deploy.train.checkpoints import save_options
from lora_deploy.train.chunked_loss import can_be_chunked, chunked_loss

__all__ = ["AdapterTrainer"]


class AdapterTrainer(Trainer):
    """Trains the adapter of a model.

    Args:
        model: With an adapter.
        args: The Trainer's arguments.
        train_rows: Rows of examples.
        eval_rows: The same for evaluation; empty for none.
        packed: Whether rows hold several examples.
        pad_id: Token that fills rows up.
        record: Goes into each checkpoint.
        options: The options that a resumed run must share; they go into each checkpoint.
        callbacks: What follows the training.

    Attributes:
        tokens: Tokens trained on since the training began, over all processes.
        seconds: Time spent on them, evaluation and saving apart.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *,
        train_rows: Sequence[Row],
        eval_rows: Sequence[Row],
        packed: bool,
        pad_id: int,
        record: TrainingRecord,
        options: dict[str, Any],
        callbacks: list[TrainerCallback],
    ) -> None:
        self.record, self.options = record, options
        self._network, self._eval_rows = model, eval_rows
        self._loss = partial(chunked_loss, model) if can_be_chunked(model) else nullcontext
        self._rows_count = len(train_rows)
        self._collate = partial(collate_packed if packed else collate_padded, pad_id=pad_id)
        self.tokens, self.seconds = 0, 0.0
        self._new_tokens = 0
        self._since: float | None = None
        self._steps_per_epoch = 1
        super().__init__(
            model=model,
            args=args,
            train_dataset=Rows(train_rows),
            eval_dataset=Rows(eval_rows) if eval_rows else None,
            data_collator=self._collate,
            callbacks=callbacks,
        )
        self.remove_callback(PrinterCallback)

    # Data order

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        # The epoch comes from the step, so it needs nobody to announce it and is right after any resume.
        return EpochSampler(self._rows_count, self.args.seed, lambda: self.state.global_step // self._steps_per_epoch)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The batches of one epoch."""
        loader: DataLoader[Any] = super().get_train_dataloader()
        self._steps_per_epoch = max(1, math.ceil(len(loader) / self.args.gradient_accumulation_steps))
        return loader

    # Steps

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Forward and backward of one batch; its tokens are counted."""
        if self._since is None:
            self._since = time.perf_counter()
        self._new_tokens += inputs.pop("num_tokens")
        loss: torch.Tensor = super().training_step(model, inputs, num_items_in_batch)
        return loss

    def compute_loss(self, *args: Any, **named: Any) -> Any:
        """The loss of a batch, without the logits of all of it where the head is frozen."""
        with self._loss():
            return super().compute_loss(*args, **named)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not counted: the Trainer would walk through all parameters at each batch."""
        return 0

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the speed to a line of the log, and stop when the loss is no number any more.

        Raises:
            DivergenceError: The training diverged.
        """
        if "loss" in logs:
            if not math.isfinite(logs["loss"]):
                raise DivergenceError(
                    f"the loss is not finite after step {self.state.global_step}: the training diverged",
                    found=logs["loss"],
                    remedy="lower --learning-rate; checkpoints from before stay where they are",
                )
            logs["tokens_per_second"] = round(self._speed(), 1)
        super().log(logs, start_time)

    def _speed(self) -> float:
        """Tokens a second since the last call, over all processes."""
        now = time.perf_counter()
        seconds = now - (now if self._since is None else self._since)
        counted = torch.tensor(self._new_tokens, dtype=torch.int64, device=self.args.device)
        tokens = int(self._sum(counted).item())
        self.tokens += tokens
        self.seconds += seconds
        self._new_tokens, self._since = 0, now
        return tokens / max(seconds, 1e-9)

    def _sum(self, values: torch.Tensor) -> torch.Tensor:
        if self.args.world_size > 1:
            torch.distributed.all_reduce(values)
        return values

    # Evaluation

    @torch.no_grad()
    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Mean loss over the learned tokens of the evaluation rows, each row counted once, whatever the processes.

        The Trainer's own evaluation gives each batch the same weight and repeats rows to fill up the processes. No
        random number is drawn here, so evaluating does not change the training.
        """
        began = time.perf_counter()
        self._network.eval()
        size = self.args.per_device_eval_batch_size
        rows = self._eval_rows[self.args.process_index :: self.args.world_size]
        total, count = 0.0, 0
        for start in range(0, len(rows), size):
            batch = self._prepare_inputs(self._collate(rows[start : start + size]))
            batch.pop("num_tokens")
            learned = int((batch["labels"][:, 1:] != IGNORED).sum())
            with self.accelerator.autocast(), self._loss():
                total += float(self._network(**batch).loss) * learned
            count += learned
        self._network.train()
        sums = self._sum(torch.tensor([total, count], dtype=torch.float64, device=self.args.device))
        metrics = {f"{metric_key_prefix}_loss": float(sums[0] / sums[1])}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self._leave_out(began)
        return metrics

    def _leave_out(self, began: float) -> None:
        """Take the time since `began` out of the speed."""
        if self._since is not None:
            self._since += time.perf_counter() - began

    # Checkpoints

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if self.args.should_save:
            directory = Path(str(output_dir))  # never None: only checkpoints are saved through here
            save_adapter(self._network, directory)
            self.record.save(directory)
            save_options(self.options, directory)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        began = time.perf_counter()
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError where a disk is full
            raise OutputError(
                "a checkpoint could not be written", file=self.args.output_dir, found=str(error).splitlines()[0]
            ) from error
        self._leave_out(began)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_adapter(self._network, resume_from_checkpoint)
