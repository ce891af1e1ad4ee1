"""What a benchmark found: as measures, as a table, and in words."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel

from lora_deploy.errors import OutputError

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["Benchmark", "Measure"]

Unit = Literal["s", "tokens/s", "texts/s", "bytes"]


class Measure(BaseModel):
    """One quantity, measured once in each run.

    Attributes:
        unit: Of the values.
        values: One a run, in order.
        median: Of the values.
        lower: Their lower quartile.
        upper: Their upper quartile.
        count: Tokens or texts that a value is about; None for memory, and for times without any.
        seconds: What each value was computed of; empty for memory. A rate is count / seconds.
    """

    unit: Unit
    values: list[float]
    median: float
    lower: float
    upper: float
    count: int | None = None
    seconds: list[float] = []

    @classmethod
    def of_seconds(cls, seconds: Sequence[float], unit: Unit, count: int | None = None) -> Measure:
        """Times, or rates where the unit is one.

        Args:
            seconds: One a run.
            unit: "s", "tokens/s" or "texts/s".
            count: Tokens or texts that they took.
        """
        values = list(seconds) if unit == "s" or count is None else [count / taken for taken in seconds]
        return cls._of(unit, values, count, list(seconds))

    @classmethod
    def of_bytes(cls, sizes: Sequence[float]) -> Measure:
        """Memory, one size a run."""
        return cls._of("bytes", list(sizes), None, [])

    @classmethod
    def _of(cls, unit: Unit, values: list[float], count: int | None, seconds: list[float]) -> Measure:
        quartiles = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
        lower, median, upper = quartiles
        return cls(unit=unit, values=values, median=median, lower=lower, upper=upper, count=count, seconds=seconds)

    def format(self, *values: float) -> str:
        """Some of the values, in the unit that suits the largest."""
        factor, unit, digits = _scale(self.unit, max(values))
        return " to ".join(f"{value * factor:,.{digits}f}" for value in values) + f" {unit}"


def _scale(unit: Unit, value: float) -> tuple[float, str, int]:
    """A factor, the unit that it leads to, and how many digits are worth showing."""
    if unit == "bytes":
        return 1e-6, "MB", 0
    if unit != "s":
        return 1.0, unit, 1
    return (1.0, "s", 2) if value >= 1 else (1e3, "ms", 1) if value >= 1e-3 else (1e6, "µs", 1)


class Benchmark(BaseModel):
    """How an export runs on this machine.

    Attributes:
        directory: The export.
        task: What it is for.
        branch: How adapters stand in it: "fixed", "hot-swap" or "pooled"; None where they are merged, or there is none.
        precision: Of its weights; None where lora-deploy did not make it.
        provider: What it ran on.
        weights: How codes ran.
        threads: As asked for; None for the default.
        adapters: Those it ran with.
        prompt_tokens: Tokens of the prompt, or of a text to classify.
        tokens: Tokens of a burst; 0 of a classifier.
        runs: Processes that measured.
        measures: What they found, by name.
        versions: Of Python and the libraries.
        machine: As `describe_machine` gives it.
    """

    directory: str
    task: str
    branch: str | None
    precision: str | None
    provider: str
    weights: str
    threads: int | None
    adapters: list[str]
    prompt_tokens: int
    tokens: int
    runs: int
    measures: dict[str, Measure]
    versions: dict[str, str]
    machine: dict[str, str | int]

    def table(self) -> Table:
        """For the screen."""
        from rich import box
        from rich.table import Table

        kind = ", ".join([*filter(None, (self.branch or "merged", self.precision)), self.provider])
        title = f"{Path(self.directory).name} ({kind}, {self.weights} weights)"
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("")  # wraps where a fast machine's numbers are wide
        for heading in ("median", "quartiles"):
            table.add_column(heading, justify="right", no_wrap=True)
        for name, measure in self.measures.items():
            words = _WORDS[name].format(prompt=self.prompt_tokens, tokens=self.tokens, rows=len(self.adapters))
            table.add_row(words, measure.format(measure.median), measure.format(measure.lower, measure.upper))
        return table

    def notes(self) -> list[str]:
        """What the numbers say of adapters, in words."""
        notes = []
        for name, other, words in _RATIOS:
            if name in self.measures and other in self.measures:
                pairs = zip(self.measures[name].values, self.measures[other].values, strict=True)
                notes.append(f"{words}: {statistics.median(own / against for own, against in pairs):.2f} times")
        return notes

    def save(self, file: Path) -> None:
        """Write it as JSON.

        Raises:
            OutputError: It could not be written.
        """
        try:
            file.write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise OutputError(
                "the benchmark could not be written", file=file, found=error.strerror or str(error)
            ) from error


_WORDS = {
    "open": "to open",
    "adapter_load": "adapter, first use",
    "first_token": "first token, prompt of {prompt}",
    "prefill": "prompt of {prompt}",
    "decode": "decoding {tokens}",
    "decode_bare": "  without adapter",
    "decode_switching": "  another adapter each token",
    "adapter_switch": "adapter switch",
    "pooled": "{rows} rows, adapters mixed",
    "singly": "  the same, one by one",
    "first_text": "first text of {prompt} tokens",
    "texts": "texts of {prompt} tokens",
    "texts_in_batch": "  eight at once",
    "peak_memory": "memory at its peak",
    "added_memory": "  since before opening",
}
_RATIOS = (
    ("decode", "decode_bare", "tokens/s with the adapter, to the bare base's"),
    ("pooled", "singly", "tokens/s of a mixed batch, to the rows one by one"),
)
