"""The page of a comparison: its numbers, its frontier, and that hostile names are words."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from lora_deploy.compare.report import Comparison, Row
from lora_deploy.pages.comparison_page import comparison_page, frontier
from lora_deploy.train.progress import LOG_NAME, write_log
from lora_deploy.verify.texts import TextResult
from tests.pages.html import Page, assert_alone
from tests.pages.test_parity_page import HOSTILE


def _row(name: str, size: float | None, speed: float | None, kl: float, *flags: str, **more: str) -> Row:
    texts = [
        TextResult(name="task", source="/home/somebody/data.jsonl", tokens=30, kl=kl, top1=0.97, loss=0.5 + kl),
        TextResult(name="general", tokens=90, kl=3 * kl, top1=0.91, loss=3.25),
    ]
    command = shlex.join(["lora-deploy", "export", "--model", "/home/somebody/base", *flags, "--output", "DIR"])
    per_second = None if speed is None else 40 * speed
    values = {"megabytes": size, "tokens_per_second": per_second, "relative_speed": speed, "texts": texts}
    return Row(name=name, command=command, **values, **more)  # type: ignore[arg-type]


ROWS = [
    _row("merged int4", 100, 1.0, 1e-3, "--merge", "--calibration", "/home/somebody/rows.jsonl"),
    _row("merged int8", 180, 0.9, 1e-5, "--merge", "--precision", "int8"),
    _row("merged fp16", 260, 0.5, 1e-4, "--merge", "--precision", "fp16"),
    _row("branch nf4", 120, 0.25, 1e-10, "--branch", "--fixed", weights="native"),
    Row(name="impossible", error="it cannot be\n  file:     /home/somebody/base"),
]


@pytest.fixture
def comparison(tmp_path: Path) -> Comparison:
    """Five ways, one of which failed, of an adapter that has a log."""
    adapter = tmp_path / "somebody" / "reminders"
    adapter.mkdir(parents=True)
    write_log(adapter / LOG_NAME, [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}])
    alone = _row("base alone", None, None, 2.0).model_copy(update={"command": ""})
    trained = _row("trained (PyTorch)", None, None, 0.0).model_copy(update={"command": ""})
    return Comparison(
        model="HuggingFaceTB/SmolLM2",
        adapter=str(adapter),
        provider="cpu",
        trained=trained,
        base_alone=alone,
        rows=ROWS,
    )


def test_every_number_is_one_of_the_comparison(comparison: Comparison) -> None:
    page = assert_alone(comparison_page(comparison))
    expected = set()
    for row in (*ROWS[:4], comparison.trained, comparison.base_alone):
        expected |= {row.megabytes, row.tokens_per_second, row.relative_speed}
        expected |= {value for text in row.texts for value in (text.kl, text.top1)} | {row.texts[0].loss}
    assert set(page.numbers) == expected - {None}
    assert "Training" in page.texts
    assert {"smallest", "fastest", "most faithful"} <= set(page.texts)
    for row in ROWS[:4]:
        assert row.name in page.texts
        assert any(title.startswith(f"{row.name}: ") for title in page.titles)


def test_what_is_said_names_no_place(comparison: Comparison, tmp_path: Path) -> None:
    content = comparison_page(comparison)
    assert b"somebody" not in content
    assert str(tmp_path).encode() not in content
    texts = Page(content).texts
    assert "--merge --calibration rows.jsonl" in texts
    assert "--branch --fixed   (run with --weights native)" in texts
    assert "impossible failed: it cannot be" in texts
    assert content == comparison_page(comparison)


def test_the_frontier_is_what_none_of_the_others_beats(comparison: Comparison) -> None:
    def names(sign: int, of: str) -> list[str]:
        return [row.name for row in frontier(ROWS[:4], lambda row: sign * getattr(row, of), comparison.kl)]

    assert names(1, "megabytes") == ["merged int4", "branch nf4"]
    assert names(-1, "relative_speed") == ["merged int4", "merged int8", "branch nf4"]
    assert frontier([], lambda row: 0.0, comparison.kl) == []
    drawn = [values["class"] for name, values in Page(comparison_page(comparison)).elements if name == "polyline"]
    assert drawn.count("frontier") == 2


def test_where_nothing_could_be_measured_there_is_a_page_all_the_same(comparison: Comparison) -> None:
    page = assert_alone(comparison_page(comparison.model_copy(update={"rows": ROWS[4:]})))
    assert "impossible" in page.texts
    assert "Size against fidelity" not in page.texts


def test_hostile_names_are_words(comparison: Comparison) -> None:
    rows = [row.model_copy(update={"name": f"{number}{HOSTILE}"}) for number, row in enumerate(ROWS)]
    rows[0].texts[0].source = HOSTILE
    changes = {"rows": rows, "model": HOSTILE, "adapter": HOSTILE, "provider": HOSTILE, "warnings": [HOSTILE]}
    content = comparison_page(comparison.model_copy(update=changes | {"versions": {HOSTILE: HOSTILE}}))
    page = assert_alone(content)
    assert sum(HOSTILE in text for text in (*page.texts, *page.titles)) > 12
    assert content.count(b"</style>") == 1
