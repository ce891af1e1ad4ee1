"""The numbers of all benchmarks as JSON, as a table in Markdown, and as a picture."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tests.benchmarks.processes import Entry

__all__ = ["Results", "format_number", "write_results"]

_NAME = "results"


@dataclass
class Results:
    """What was found, with what and on what.

    Attributes:
        parts: Of each part its comparisons by name.
        versions: Of Python and the libraries.
        machine: As `lora_deploy.bench.machine.describe_machine` gives it.
    """

    parts: dict[str, dict[str, Entry]] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    machine: dict[str, str | int] = field(default_factory=dict)

    @classmethod
    def read(cls, directory: Path) -> Results:
        """What an earlier command wrote; nothing where there was none."""
        file = directory / f"{_NAME}.json"
        return cls(**json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else cls()

    def markdown(self) -> str:
        """A table of every part, and below it machine and versions."""
        lines = []
        for part, entries in self.parts.items():
            lines += [f"## {part}", "", "| | ours | peer | ours / peer | |", "| --- | ---: | ---: | ---: | --- |"]
            for name, entry in entries.items():
                numbers = " | ".join(format_number(entry[key]) for key in ("ours", "peer", "ratio"))
                lines.append(f"| {name} | {numbers} | {entry['unit']} |")
            lines.append("")
        memory = int(self.machine["memory_bytes"]) / 1e9
        lines.append(f"{self.machine['processor']}, {self.machine['cores']} cores, {memory:.0f} GB of memory, ")
        lines.append(f"{self.machine['system']}; " + ", ".join(f"{name} {v}" for name, v in self.versions.items()))
        return "\n".join(lines) + "\n"


def format_number(value: float | str | None) -> str:
    """With three digits; nothing for None."""
    if value is None:
        return ""
    return f"{float(value):,.0f}" if abs(float(value)) >= 1000 else f"{float(value):.3g}"


def write_results(results: Results, directory: Path) -> None:
    """Write results.json, results.md, and results.png where there is a ratio to draw."""
    text = json.dumps(asdict(results), indent=2) + "\n"
    (directory / f"{_NAME}.json").write_text(text, encoding="utf-8")
    (directory / f"{_NAME}.md").write_text(results.markdown(), encoding="utf-8")
    bars = [
        (f"{part}: {name.removeprefix(f'{part}, ')} ({entry['unit']})", float(entry["ratio"]))
        for part, entries in results.parts.items()
        for name, entry in entries.items()
        if entry["ratio"] is not None
    ]
    if bars:
        _draw(bars, directory / f"{_NAME}.png")


def _draw(bars: list[tuple[str, float]], file: Path) -> None:
    """Ratios as bars from 1, which is the peer, on a logarithmic scale. Of a rate more is better, of the rest less."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    figure = Figure(figsize=(11, 1.2 + 0.32 * len(bars)), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for place, (name, ratio) in enumerate(bars):
        is_better = ratio >= 1 if name.endswith("/s)") else ratio <= 1
        axes.barh(place, ratio - 1, left=1, color="tab:green" if is_better else "tab:red")
        axes.annotate(f" {ratio:.2f} ", (ratio, place), va="center", ha="left" if ratio >= 1 else "right", fontsize=8)
    axes.set_yticks(range(len(bars)), [name for name, _ in bars], fontsize=8)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(base=2))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.margins(x=0.15)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xlabel("ours / peer; green: faster, or less time or memory")
    figure.savefig(file, format="png", metadata={"Software": None})
