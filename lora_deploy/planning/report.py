"""What a study found: a row for each choice, its mean and spread over the seeds, as a table and in words."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from lora_deploy.planning.choices import Choice
from lora_deploy.planning.held_out import Judgement
from lora_deploy.planning.options import StudyOptions
from lora_deploy.planning.plan import Plan, PlanRow
from lora_deploy.planning.runs import RunResult
from lora_deploy.versions import installed_versions

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["REPORT_NAME", "Study", "StudyRow", "best_rate"]

REPORT_NAME = "plan.json"

_LIBRARIES = ("bitsandbytes", "lora-deploy", "torch", "transformers")


class StudyRow(BaseModel):
    """One choice.

    Attributes:
        name: Of the choice.
        rank: Of every update.
        parameters: Trained ones.
        deviation: From the budget, as a part of it.
        learning_rate: The one of those tried at which its loss is lowest with the first seed; None where every run
            failed.
        losses: Held-out loss with that rate, seed by seed, nats a token.
        exact: Share of the held-out prompts answered exactly, seed by seed; empty where nothing was asked.
        loss_by_rate: Held-out loss of the first seed with each learning rate; absent where that run failed.
        errors: What failed.
    """

    name: str
    rank: int
    parameters: int
    deviation: float
    learning_rate: float | None = None
    losses: list[float] = []
    exact: list[float] = []
    loss_by_rate: dict[str, float] = {}
    errors: list[str] = []

    @property
    def loss(self) -> float:
        """Mean held-out loss; infinity where every run failed."""
        return statistics.fmean(self.losses) if self.losses else math.inf

    @property
    def loss_spread(self) -> float:
        """Standard deviation of the loss over the seeds (of a sample); 0 for one seed."""
        return _spread(self.losses)

    @property
    def mean_exact(self) -> float | None:
        """Mean share of exact answers."""
        return statistics.fmean(self.exact) if self.exact else None

    @classmethod
    def of(cls, choice: Choice, runs: Sequence[RunResult]) -> StudyRow:
        """The row of a choice.

        Args:
            choice: The choice.
            runs: Of the study; those with the first seed come first.
        """
        row = cls(name=choice.name, rank=choice.rank, parameters=choice.parameters, deviation=choice.deviation)
        row.learning_rate = best_rate(choice.name, runs)
        for run in (run for run in runs if run.choice == choice.name):
            if run.error is not None:
                row.errors.append(f"learning rate {run.learning_rate:g}, seed {run.seed}: {run.error}")
            if run.judgement is None:
                continue
            if run.seed == runs[0].seed:
                row.loss_by_rate[f"{run.learning_rate:g}"] = run.judgement.loss
            if run.learning_rate == row.learning_rate:
                row.losses.append(run.judgement.loss)
                row.exact += [] if run.judgement.exact is None else [run.judgement.exact]
        return row


def best_rate(choice: str, runs: Sequence[RunResult]) -> float | None:
    """The learning rate at which the held-out loss of a choice is lowest, with the first seed.

    Args:
        choice: Its name.
        runs: Of the study; those with the first seed come first.

    Returns:
        The rate; None where every run of the choice failed.
    """
    judged = {
        run.learning_rate: run.judgement.loss
        for run in runs
        if run.choice == choice and run.seed == runs[0].seed and run.judgement is not None
    }
    return min(judged, key=lambda rate: judged[rate]) if judged else None


class Study(BaseModel):
    """The choices beside each other.

    Attributes:
        model: The base, as it was named.
        plan: The listing.
        settings: What every run shared.
        seeds: Of the runs.
        learning_rates: That were tried.
        base: The base alone on the held-out rows.
        rows: The choices that were trained, in the order of the plan.
        runs: Every run.
        left_out: Choices that are too far from the budget to be compared.
        versions: Of the libraries.
    """

    model: str
    plan: list[PlanRow]
    settings: dict[str, Any]
    seeds: list[int]
    learning_rates: list[float]
    base: Judgement
    rows: list[StudyRow]
    runs: list[RunResult]
    left_out: list[str] = []
    versions: dict[str, str] = {}

    @classmethod
    def of(
        cls,
        plan: Plan,
        options: StudyOptions,
        choices: Sequence[Choice],
        base: Judgement,
        runs: Sequence[RunResult],
        left_out: Sequence[str],
    ) -> Study:
        """Put the results together."""
        rows = [StudyRow.of(choice, runs) for choice in choices]
        return cls(
            model=options.model,
            plan=plan.rows,
            settings=options.that_matter() | {"budget": plan.budget},
            seeds=list(options.seeds),
            learning_rates=list(options.learning_rates),
            base=base,
            rows=rows,
            runs=list(runs),
            left_out=list(left_out),
            versions=installed_versions(*_LIBRARIES),
        )

    @property
    def ranking(self) -> list[StudyRow]:
        """The rows that were trained, the lowest mean loss first."""
        return sorted((row for row in self.rows if row.losses), key=lambda row: row.loss)

    def summary(self) -> str:
        """In words which choice is best, and whether the seeds can tell it from the next one."""
        ranking = self.ranking
        if not ranking:
            return "none of the runs could be judged"
        best = ranking[0]
        words = f"lowest held-out loss: {best.name} at rank {best.rank}, {_mean_and_spread(best.losses)}"
        if len(ranking) == 1:
            return words
        second = ranking[1]
        words += f"; then {second.name} at rank {second.rank}, {_mean_and_spread(second.losses)}"
        if len(best.losses) < 2:
            return words + ". One seed cannot say how much of the difference is chance"
        won = sum(one < other for one, other in zip(best.losses, second.losses, strict=True))
        return words + f". With the same seed {best.name} is ahead in {won} of {len(best.losses)}"

    def notes(self) -> list[str]:
        """What may change the order of the choices: rates that were not tried, and choices that were not trained."""
        notes = []
        for word, other, edge in (("highest", "higher", max), ("lowest", "lower", min)):
            names = [row.name for row in self.rows if row.learning_rate == edge(self.learning_rates)]
            if names and len(self.learning_rates) > 1:
                notes.append(
                    f"best at the {word} learning rate tried, so that a {other} one may be better: {', '.join(names)}"
                )
        if self.left_out:
            notes.append(f"too far from the budget to be compared: {', '.join(self.left_out)}")
        return notes

    def save(self, directory: Path) -> None:
        """Write `plan.json`; raises OSError."""
        (directory / REPORT_NAME).write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")

    def table(self) -> Table:
        """For the screen: the choices beside each other, as the LoRA paper's table 5 has them."""
        from rich import box
        from rich.table import Table

        seeds = f"{len(self.seeds)} seed{'s' if len(self.seeds) > 1 else ''}"
        title = (
            f"Held-out data after {self.runs[0].steps if self.runs else 0} steps, mean ± standard deviation, {seeds}"
        )
        # With one space between the columns it fits into 80 columns.
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
        table.add_column("", no_wrap=True)
        headings = ["rank", "parameters", "rate", "loss", *(["exact"] if self.base.answered else [])]
        for heading in headings:
            table.add_column(heading, justify="right", no_wrap=True)
        for row in self.rows:
            rate = "failed" if row.learning_rate is None else f"{row.learning_rate:g}"
            cells = [str(row.rank), f"{row.parameters:,}", rate, _mean_and_spread(row.losses)]
            style = None if row.losses else "red"
            table.add_row(row.name, *cells, *self._exact(row.exact), style=style)
        table.add_row("base alone", "", "", "", f"{self.base.loss:.4f}", *self._exact([self.base.exact]), style="dim")
        return table

    def _exact(self, values: Sequence[float | None]) -> list[str]:
        if not self.base.answered:
            return []
        return [_mean_and_spread([value for value in values if value is not None], lambda value: f"{value:.1%}")]


def _spread(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _mean_and_spread(values: Sequence[float], form: Callable[[float], str] = lambda value: f"{value:.4f}") -> str:
    if not values:
        return ""
    spread = f" ± {form(_spread(values))}" if len(values) > 1 else ""
    return form(statistics.fmean(values)) + spread
