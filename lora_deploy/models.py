"""Which models are verified, and what of them: a table that `python -m tests.verified --write` makes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

__all__ = [
    "HEADINGS",
    "TABLE",
    "VerifiedFamily",
    "VerifiedTask",
    "load_table",
    "markdown_table",
    "table_cells",
    "write_table",
]

VerifiedTask = Literal["causal-lm", "sequence-classification", "token-classification", "seq2seq-lm"]

TABLE = Path(__file__).with_name("models.json")
_PEFT_TASKS: dict[VerifiedTask, str] = {
    "causal-lm": "CAUSAL_LM",
    "sequence-classification": "SEQ_CLS",
    "token-classification": "TOKEN_CLS",
    "seq2seq-lm": "SEQ_2_SEQ_LM",
}
_BASES = {"none", "nf4", "fp4", "int8"}
HEADINGS = ("model_type", "task", "graph", "merge", "hot-swap", "fixed", "pooled", "variants")


class VerifiedFamily(BaseModel):
    """What tests found of one family, on tiny random models, in fp32, against released PEFT.

    Attributes:
        model_type: As the configuration has it; of T5 also which kind.
        task: What the model is for.
        graph: Where `--graph auto` takes its graph from.
        merge: Bases whose merged exports compute what was trained: "none" (dense), "nf4", "fp4", "int8".
        branch: Bases of each kind of branch that does: "hot-swap", "fixed", "pooled".
        traced: Variants of its configuration whose graph is traced, for mobius gets them wrong.
        refused: Variants that are refused.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model_type: str
    task: VerifiedTask
    graph: Literal["mobius", "traced"]
    merge: tuple[str, ...]
    branch: dict[str, tuple[str, ...]]
    traced: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()


def load_table() -> list[VerifiedFamily]:
    """The table of this version."""
    return [VerifiedFamily.model_validate(row) for row in json.loads(TABLE.read_text(encoding="utf-8"))]


def write_table(rows: Sequence[VerifiedFamily]) -> None:
    """Put a table in the place of the shipped one."""
    text = json.dumps([row.model_dump(mode="json") for row in rows], indent=1, ensure_ascii=False)
    TABLE.write_text(text + "\n", encoding="utf-8")


def table_cells(row: VerifiedFamily) -> tuple[str, ...]:
    """A row as text, below HEADINGS; "all" stands for bases that are dense, nf4, fp4 and int8."""
    kinds = (row.merge, row.branch["hot-swap"], row.branch["fixed"], row.branch["pooled"])
    variants = [
        f"{', '.join(names)}: {what}" for names, what in ((row.traced, "traced"), (row.refused, "refused")) if names
    ]
    return row.model_type, _PEFT_TASKS[row.task], row.graph, *map(_bases, kinds), "; ".join(variants)


def _bases(bases: Sequence[str]) -> str:
    return "all" if set(bases) == _BASES else ", ".join("dense" if base == "none" else base for base in bases) or "-"


def markdown_table(rows: Sequence[VerifiedFamily]) -> str:
    """The table as the README shows it."""
    lines = [HEADINGS, ("---",) * len(HEADINGS), *map(table_cells, rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
