"""What the fault suite tried, and what survived: the table in the README.

python -m pytest -n 2 --dist loadfile tests/faults tests/fuzz tests/attacks -m "slow or not slow" --fault-table FILE
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

__all__ = ["Tally"]


class Tally:
    """Counts of faults, by kind. "Survived" is what the kind promises: old or new whole, refused, or found."""

    def __init__(self) -> None:
        self.tried: Counter[str] = Counter()
        self.survived: Counter[str] = Counter()

    def __call__(self, kind: str, survived: bool) -> None:
        """Count one fault; called before the assertion, so that what is lost is counted too."""
        self.tried[kind] += 1
        self.survived[kind] += survived

    def table(self) -> str:
        """As Markdown."""
        lines = ["| fault | tried | survived | lost |", "|---|---:|---:|---:|"]
        for kind, tried in sorted(self.tried.items()):
            survived = self.survived[kind]
            lines.append(f"| {kind} | {tried:,} | {survived:,} | {tried - survived:,} |")
        return "\n".join(lines) + "\n"


_TALLY = Tally()


@pytest.fixture(scope="session")
def tally() -> Tally:
    """`tally(kind, survived)`."""
    return _TALLY


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fault-table", help="write what the fault suite tried, and what survived, as Markdown")


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """What a worker of `-n` has counted."""
    for counter, counted in zip(
        (_TALLY.tried, _TALLY.survived), getattr(node, "workeroutput", {}).get("faults", []), strict=False
    ):
        counter.update(counted)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["faults"] = [dict(_TALLY.tried), dict(_TALLY.survived)]
        return
    file = session.config.getoption("--fault-table")
    if file and _TALLY.tried:
        Path(file).write_text(_TALLY.table(), encoding="utf-8")
