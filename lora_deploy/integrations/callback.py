"""A callback of transformers' Trainer, and so of TRL's: what it trained is exported and verified at its end."""

from __future__ import annotations

import inspect
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from lora_deploy.errors import LoraDeployError, UsageError
from lora_deploy.integrations.spread import alone, meeting, refuse_spread, will_be_spread
from lora_deploy.integrations.trained import save_together, write_together
from lora_deploy.terminal import make_console, print_page, print_report, show_progress

if TYPE_CHECKING:
    from torch import nn
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from lora_deploy.adapter import TrainingRecord
    from lora_deploy.export import ExportResult

__all__ = ["ExportCallback"]

_NOT_OF_A_PLAN = ("merge", "verify", "data", "max_kl")


class ExportCallback(TrainerCallback):
    """Exports the adapter when the training ends, and proves that the export computes what was trained.

    Before the first step everything is checked that can be: that the checkpoint is what the model in memory holds, that
    the adapter can be exported this way, that the output may be written. The adapter is written first, to `adapter`,
    and stays there whatever becomes of the export.

    Of several processes the first one writes, and the others wait for it. Where FSDP2 or DeepSpeed ZeRO-3 spreads the
    parameters, it is checked when the Trainer is made, and what was trained is gathered in the end.

    Args:
        output: Directory to export to.
        adapter: Directory for the adapter; None for `adapter` in the Trainer's `output_dir`.
        base: The checkpoint that the base was loaded from; None for what the model says.
        quiet: Show neither progress nor the report.
        **options: As `export_onnx` takes them: merge, branch, precision, overwrite, ...

    Attributes:
        result: What was exported; None before the training's end, and in other processes than the first.

    Raises:
        UsageError, InputError, OutputError: Before the training, as `export_onnx`; or the parameters are spread over
            processes by something else, or the callback was added after the Trainer was made.
        ParityError: After the training: the export does not compute what was trained, and is not there.
    """

    def __init__(
        self,
        output: str | Path,
        *,
        adapter: str | Path | None = None,
        base: str | Path | None = None,
        quiet: bool = False,
        **options: Any,
    ) -> None:
        from lora_deploy.export import export_onnx

        taken = set(inspect.signature(export_onnx).parameters) - {"model", "adapter", "output", "on_progress"}
        unknown = sorted(set(options) - (taken - {"example_inputs", "dynamic_axes"}))
        if unknown:
            raise TypeError(f"ExportCallback got unexpected options: {', '.join(unknown)}")
        if options.get("merge", True) and options.get("branch") is not None:
            raise UsageError(
                "an adapter is merged, or it is a branch",
                found=f"branch={options['branch']!r}",
                remedy="say merge=False",
            )
        self.output = Path(output)
        self.result: ExportResult | None = None
        self._adapter = None if adapter is None else Path(adapter)
        self._base = base
        self._options = options
        self._quiet = quiet
        self._record: TrainingRecord | None = None
        self._checked = False

    def on_init_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **others: Any,
    ) -> None:
        """Check all that can be checked where it cannot be later: while each process has the parameters."""
        assert model is not None
        if will_be_spread():
            self._check_together(args, state, model)
            self._checked = True

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **others: Any,
    ) -> None:
        """Check all that can be checked, with the adapter as it is now."""
        assert model is not None
        if self._checked:
            return
        refuse_spread(model)
        self._check_together(args, state, model)

    def _check_together(self, args: TrainingArguments, state: TrainerState, model: nn.Module) -> None:
        """Check all that can be checked; every process must come here, and the first does it."""
        meet = meeting(args.world_size)
        if state.is_world_process_zero:
            with alone():
                self._check(model)
        else:
            save_together(model, None, self._base)
        meet()

    def _check(self, model: nn.Module) -> None:
        from lora_deploy.export.plan import plan_export
        from lora_deploy.verify.report import check_comparison

        check_comparison(self._options.get("data"), self._options.get("max_kl"))
        options = {name: value for name, value in self._options.items() if name not in _NOT_OF_A_PLAN}
        if self._options.get("merge", True):
            options["branch"] = None
        else:
            options["branch"] = self._options.get("branch") or "hot-swap"
        with tempfile.TemporaryDirectory(prefix="lora-deploy-") as scratch:
            self._record = save_together(model, Path(scratch), self._base)
            assert self._record is not None
            plan_export(self._record.base_model, {"adapter": scratch}, self.output, **options)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **others: Any,
    ) -> None:
        """Write the adapter and the log of its training, export it, prove the export."""
        assert model is not None
        directory = self._adapter or Path(str(args.output_dir)) / "adapter"
        write_together(model, directory if state.is_world_process_zero else None)
        meet = meeting(args.world_size)
        try:
            if state.is_world_process_zero:
                with alone():
                    self._export(directory, state)
        finally:
            meet()

    def _export(self, directory: Path, state: TrainerState) -> None:
        """Export the adapter of a directory."""
        from lora_deploy.export import export_onnx
        from lora_deploy.train.progress import LOG_NAME, log_lines, write_log

        assert self._record is not None
        self._record.save(directory)
        lines = log_lines(state.log_history)
        if lines:
            write_log(directory / LOG_NAME, lines)
        console = make_console(self._quiet)
        try:
            with show_progress(console) as on_progress:
                self.result = export_onnx(
                    self._record.base_model,
                    {directory.name: directory},
                    output=self.output,
                    on_progress=on_progress,
                    **self._options,
                )
        except LoraDeployError as error:
            error.details["adapter"] = f"{directory}, which is whole"
            raise
        for warning in self.result.warnings:
            console.print(f"warning: {warning}", style="yellow", soft_wrap=True, markup=False)
        if self.result.report is not None:
            print_report(console, self.result.report)
        console.print(f"{self.result.bytes / 1e6:,.1f} MB in {self.result.output}", soft_wrap=True, markup=False)
        print_page(console, self.result.output)
