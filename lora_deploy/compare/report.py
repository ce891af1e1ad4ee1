"""What a comparison found: as rows, as a table, and in words."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel

from lora_deploy.verify.texts import TextResult

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["LOWEST", "REPORT_NAME", "Comparison", "Row"]

REPORT_NAME = "comparison.json"
# Where less is drawn: a distance of zero has no place on a logarithmic scale, and this little is rounding in float32.
LOWEST = 1e-10


class Row(BaseModel):
    """One way to deploy, or what it is compared with.

    Attributes:
        name: What it is called.
        command: The command line that exports it; empty for what is no export.
        weights: How its codes run: "stored", or "native" for `lora-deploy run --weights native`.
        megabytes: Graph and weights on disk, 10^6 bytes; None for what is no export.
        tokens_per_second: Of one row, after a prompt of 64 tokens; None for what is no export.
        relative_speed: To that of the first row that could be measured; bursts of the two were taken in turns.
        texts: How it differs from the trained function on each text.
        error: Why it could not be exported or measured; None where it could.
    """

    name: str
    command: str = ""
    weights: str = "stored"
    megabytes: float | None = None
    tokens_per_second: float | None = None
    relative_speed: float | None = None
    texts: list[TextResult] = []
    error: str | None = None

    def text(self, name: str) -> TextResult | None:
        """What was found on the text of this name, "task" or "general"; None where there is none."""
        return next((text for text in self.texts if text.name == name), None)


class Comparison(BaseModel):
    """The candidates beside each other.

    Attributes:
        model: The base, as it was named.
        adapter: The adapter's directory.
        provider: What they ran on.
        trained: What they are compared with, the trained function in float32 PyTorch: its loss.
        base_alone: The base without the adapter: how much there is to lose.
        rows: The candidates, in the order in which they were tried.
        versions: Of the libraries.
        cpu_count: Of the machine; speeds are of this machine only.
        warnings: What the user should know.
    """

    model: str
    adapter: str
    provider: str
    trained: Row
    base_alone: Row
    rows: list[Row]
    versions: dict[str, str] = {}
    cpu_count: int | None = None
    warnings: list[str] = []

    @property
    def main_text(self) -> str:
        """The text that decides: that of the task, if there is one."""
        return "task" if self.trained.text("task") is not None else "general"

    @property
    def measured(self) -> list[Row]:
        """Rows without an error, and with numbers."""
        return [row for row in self.rows if row.error is None and math.isfinite(self.kl(row))]

    def kl(self, row: Row) -> float:
        """A row's distance from what was trained, on the text that decides, nats a token."""
        found = row.text(self.main_text)
        return math.nan if found is None else found.kl

    def best(self) -> dict[str, Row]:
        """The smallest, the fastest and the most faithful; empty where none could be measured."""
        if not self.measured:
            return {}
        orders: dict[str, Callable[[Row], float]] = {
            "smallest": lambda row: row.megabytes or math.inf,
            "fastest": lambda row: -(row.relative_speed or 0),
            "most faithful": self.kl,
        }
        return {word: min(self.measured, key=order) for word, order in orders.items()}

    def summary(self) -> str:
        """In words which is best at what, and the command that exports each."""
        best = self.best()
        if not best:
            return "none of the candidates could be measured"
        values = {
            "smallest": lambda row: f"{row.megabytes:,.0f} MB",
            "fastest": lambda row: f"{row.tokens_per_second:,.0f} tokens/s",
            "most faithful": lambda row: f"KL {self.kl(row):.1e}",
        }
        lines = ["; ".join(f"{word}: {row.name} ({values[word](row)})" for word, row in best.items())]
        for row in {row.name: row for row in best.values()}.values():
            then = "" if row.weights == "stored" else f"   # then: lora-deploy run DIR --weights {row.weights}"
            lines.append(f"  {row.name}: {row.command}{then}")
        return "\n".join(lines)

    def save(self, directory: Path) -> None:
        """Write `comparison.json`; raises OSError."""
        (directory / REPORT_NAME).write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")

    def table(self) -> Table:
        """For the screen."""
        from rich import box
        from rich.table import Table

        title = f"Precisions on {self.provider}, against the trained model"
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("", no_wrap=True)
        names = [text.name for text in self.trained.texts]
        columns = [f"{name} {what}" for name in names for what in _SHOWN[name]]
        for heading in ("MB", "tokens/s", "speed", *columns):
            table.add_column(heading, justify="right", min_width=7 if heading.endswith("KL") else None)
        for row in (*self.rows, self.trained, self.base_alone):
            cells = [_SHOWN[text.name][what](text) for text in row.texts for what in _SHOWN[text.name]]
            size = "" if row.megabytes is None else f"{row.megabytes:,.0f}"
            speeds = ["", ""]
            if row.tokens_per_second is not None and row.relative_speed is not None:
                speeds = [f"{row.tokens_per_second:,.1f}", f"{row.relative_speed:.2f} x"]
            style = "dim" if row in (self.trained, self.base_alone) else "red" if row.error else None
            table.add_row(row.name, "failed" if row.error else size, *speeds, *cells, style=style)
        return table


_KL_AND_TOP1: dict[str, Callable[[TextResult], str]] = {
    "KL": lambda text: f"{text.kl:.1e}",
    "top-1": lambda text: f"{text.top1:.1%}",
}
# On a general text a loss says little of an adapter.
_SHOWN: dict[str, dict[str, Callable[[TextResult], str]]] = {
    "task": {**_KL_AND_TOP1, "loss": lambda text: f"{text.loss:.3f}"},
    "general": {"KL": _KL_AND_TOP1["KL"]},
}
