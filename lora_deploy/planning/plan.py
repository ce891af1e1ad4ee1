"""The listing: what spends the same number of trainable parameters, and what each of it costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import BaseModel

from lora_deploy.errors import UsageError
from lora_deploy.planning.base import PlannedBase
from lora_deploy.planning.budget import format_count
from lora_deploy.planning.choices import FAIR, Choice, find_choices, suggest_budget
from lora_deploy.planning.cost import BranchCost, TrainingMemory, adapter_bytes, branch_cost, estimate_memory
from lora_deploy.planning.trace import find_sites
from lora_deploy.quantization.model import linear_modules
from lora_deploy.quantization.scheme import QuantizationScheme
from lora_deploy.quantization.skeleton import describe_linear

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["Plan", "PlanRow", "make_plan"]

_LENGTH = 1024  # of a row, where nothing else is said: what the training takes

OnProgress = Callable[[str, int, int], None]


class PlanRow(BaseModel):
    """One choice and what it costs.

    Attributes:
        name: Of the choice.
        rank: Of every update.
        target_modules: What `lora-deploy train --target-modules` takes.
        layers: How many layers are adapted.
        parameters: Trainable ones, exactly.
        deviation: From the budget, as a part of it; negative for less.
        fair: Whether it spends the budget nearly enough to be compared.
        adapter_bytes: Size of `adapter_model.safetensors`.
        memory: Of the training, an estimate; None where torch could not trace it.
        branch: What it adds as a branch; merged it adds nothing. None where torch could not trace the model.
    """

    name: str
    rank: int
    target_modules: list[str]
    layers: int
    parameters: int
    deviation: float
    fair: bool
    adapter_bytes: int
    memory: TrainingMemory | None
    branch: BranchCost | None


@dataclass(frozen=True)
class Plan:
    """The choices of a model and a budget.

    Attributes:
        model: As it was named.
        scheme: How the base is quantized in training.
        budget: Trainable parameters asked for.
        suggestion: A budget near it that the choices spend more evenly; None where it is even enough.
        batch_size: Rows of a step, for the memory.
        length: Tokens of a row, for the memory.
        device: Where the training would run, for the memory.
        multiply_adds: Of the base's linear layers for a token.
        choices: The choices.
        rows: The same with their costs, in the same order.
        warnings: What could not be found out.
    """

    model: str
    scheme: QuantizationScheme
    budget: int
    suggestion: int | None
    batch_size: int
    length: int
    device: str
    multiply_adds: int
    choices: list[Choice]
    rows: list[PlanRow]
    warnings: list[str]

    def values(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "model": self.model,
            "quantization": str(self.scheme),
            "budget": self.budget,
            "suggestion": self.suggestion,
            "batch_size": self.batch_size,
            "length": self.length,
            "device": self.device,
            "multiply_adds": self.multiply_adds,
            "choices": [row.model_dump(mode="json") for row in self.rows],
            "warnings": self.warnings,
        }

    def table(self) -> Table:
        """For the screen."""
        from rich import box
        from rich.table import Table

        title = f"{self.budget:,} trainable parameters on {self.scheme}"
        # With one space between the columns it fits into 80 columns.
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
        table.add_column("", no_wrap=True)
        estimated = any(row.memory for row in self.rows)
        memory_heading = ["train MB"] if estimated else []
        for heading in ("rank", "parameters", "off", "file MB", *memory_heading, "branch MB", "MACs"):
            table.add_column(heading, justify="right", no_wrap=True)
        for row in self.rows:
            memory = [] if not estimated else ["?"] if row.memory is None else [f"~{row.memory.total / 1e6:,.0f}"]
            branch = ["?", "?"]
            if row.branch is not None:
                part = row.branch.multiply_adds / self.multiply_adds
                branch = [f"{row.branch.bytes / 1e6:.1f}", f"+{part:.1%}"]
            cells = [str(row.rank), f"{row.parameters:,}", f"{row.deviation:+.1%}", f"{row.adapter_bytes / 1e6:.1f}"]
            table.add_row(row.name, *cells, *memory, *branch, style=None if row.fair else "dim")
        return table

    def notes(self) -> list[str]:
        """What the table cannot say by itself."""
        total = format_count(self.multiply_adds)
        notes = [
            f"as a branch: what an export with --branch adds in float32, and to the {total} multiply-adds "
            "of a token; --merge adds nothing",
        ]
        if any(row.memory for row in self.rows):
            where = f"{self.batch_size} rows of {self.length} tokens on {self.device}"
            notes.insert(0, f"train MB: an estimate for {where}, the libraries apart")
        off = [row.name for row in self.rows if not row.fair]
        if off:
            notes.append(f"more than {FAIR:.0%} off the budget, so not comparable: {', '.join(off)}")
        if self.suggestion is not None:
            notes.append(f"--budget {self.suggestion} would be spent more evenly")
        return notes


def make_plan(
    model: str | Path,
    budget: int,
    *,
    scheme: QuantizationScheme | None = None,
    batch_size: int = 4,
    max_length: int | None = None,
    device: str = "auto",
    memory: bool = True,
    on_progress: OnProgress = lambda task, done, total: None,
) -> Plan:
    """List the choices of target modules and rank that spend a budget, from the model's configuration alone.

    Args:
        model: A local directory or a hub id; no weights are read.
        budget: Trainable parameters.
        scheme: How the base is quantized in training; None for what the checkpoint is, or else nf4.
        batch_size: Rows of a step.
        max_length: Tokens of a row; None for 1024, or less where the model takes less.
        device: "auto", "cpu" or "cuda".
        memory: Whether to estimate the memory of the training, which takes a second or more for each choice.
        on_progress: Is told what is being done, how much of it is done and of how much.

    Raises:
        CheckpointError: There is no such model, or its matrices cannot be recognised.
        UsageError: No choice can spend the budget, or a row is longer than the model takes.
    """
    base = PlannedBase.open(model, scheme)
    length = _row_length(base, max_length)
    choices = find_choices(base.kinds, budget)
    on_gpu = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    warnings: list[str] = []
    sites = _find_sites(base, warnings)
    shapes = {name: describe_linear(module).shape for name, module in linear_modules(base.skeleton).items()}
    rows = []
    for done, choice in enumerate(choices):
        on_progress("choices", done, len(choices))
        estimate = _estimate(base, choice, batch_size, length, on_gpu, warnings) if memory else None
        rows.append(_row(choice, estimate, branch_cost(choice, sites, shapes) if sites else None))
    on_progress("choices", len(choices), len(choices))
    return Plan(
        model=str(model),
        scheme=base.scheme,
        budget=budget,
        suggestion=_suggestion(base, choices),
        batch_size=batch_size,
        length=length,
        device="cuda" if on_gpu else "cpu",
        multiply_adds=base.multiply_adds(),
        choices=choices,
        rows=rows,
        warnings=list(dict.fromkeys(warnings)),
    )


def _suggestion(base: PlannedBase, choices: list[Choice]) -> int | None:
    """A budget that is spent more evenly by more than a hundredth, if there is one."""
    better = suggest_budget(base.kinds, choices[0].budget)
    then = max(abs(choice.deviation) for choice in find_choices(base.kinds, better))
    return better if max(abs(choice.deviation) for choice in choices) > then + 0.01 else None


def _find_sites(base: PlannedBase, warnings: list[str]) -> list[tuple[str, ...]]:
    try:
        return find_sites(base.config, base.task)
    except Exception as error:  # a model's own code, on tensors that it may not expect
        warnings.append(f"the cost as a branch is not known: {_first_line(error)}")
        return []


def _row_length(base: PlannedBase, asked: int | None) -> int:
    limit = base.max_length
    if asked is not None and limit is not None and asked > limit:
        raise UsageError("--max-length is more than the model takes", found=asked, expected=f"at most {limit}")
    return asked or min(_LENGTH, limit or _LENGTH)


def _estimate(
    base: PlannedBase, choice: Choice, batch: int, length: int, on_gpu: bool, warnings: list[str]
) -> TrainingMemory | None:
    if base.task != "causal-lm":
        warnings.append("the memory of training is not known: lora-deploy trains language models only")
        return None
    try:
        return estimate_memory(base, choice, batch=batch, length=length, on_gpu=on_gpu)
    except Exception as error:  # as above
        warnings.append(f"the memory of training is not known: {_first_line(error)}")
        return None


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]


def _row(choice: Choice, memory: TrainingMemory | None, branch: BranchCost | None) -> PlanRow:
    return PlanRow(
        name=choice.name,
        rank=choice.rank,
        target_modules=choice.targets,
        layers=len(choice.shapes),
        parameters=choice.parameters,
        deviation=choice.deviation,
        fair=choice.fair,
        adapter_bytes=adapter_bytes(choice.shapes, choice.rank),
        memory=memory,
        branch=branch,
    )
