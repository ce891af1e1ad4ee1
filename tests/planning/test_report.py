"""What a study says of its runs, in numbers and in words."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from lora_deploy.planning.choices import Choice
from lora_deploy.planning.held_out import Judgement
from lora_deploy.planning.picture import draw_study
from lora_deploy.planning.report import Study, StudyRow, best_rate
from lora_deploy.planning.runs import RunResult

LOSSES = {
    # choice: {rate: losses, seed by seed}; only the best rate of the first seed is tried with the others
    "wide": {1e-3: [0.9], 1e-2: [0.5, 0.6, 0.7]},
    "narrow": {1e-3: [0.4, 0.8, 0.5], 1e-2: [0.8]},
    "broken": {1e-3: [None], 1e-2: [None]},
}


def _run(choice: str, rate: float, seed: int, loss: float | None) -> RunResult:
    judgement = None if loss is None else Judgement(loss=loss, exact=1 - loss, answered=10)
    error = "diverged" if loss is None else None
    return RunResult(choice=choice, rank=2, learning_rate=rate, seed=seed, steps=7, judgement=judgement, error=error)


@pytest.fixture
def study() -> Study:
    """Three choices, three seeds, two rates; one choice never worked."""
    runs = [
        _run(name, rate, seed, losses[seed])
        for seed in range(3)
        for name, rates in LOSSES.items()
        for rate, losses in rates.items()
        if seed < len(losses)
    ]
    rows = [StudyRow.of(Choice(name, (), 2, 100), runs) for name in LOSSES]
    return Study(
        model="m",
        plan=[],
        settings={"budget": 100},
        seeds=[0, 1, 2],
        learning_rates=[1e-3, 1e-2],
        base=Judgement(loss=2.0, exact=0.0, answered=10),
        rows=rows,
        runs=runs,
        left_out=["mlp"],
    )


def test_each_choice_has_its_best_rate_by_the_first_seed_alone(study: Study) -> None:
    wide, narrow, broken = study.rows
    assert (wide.learning_rate, wide.losses) == (1e-2, [0.5, 0.6, 0.7])
    assert (narrow.learning_rate, narrow.losses) == (1e-3, [0.4, 0.8, 0.5])
    assert wide.loss_by_rate == {"0.001": 0.9, "0.01": 0.5}
    assert (wide.loss, wide.loss_spread) == (pytest.approx(0.6), pytest.approx(0.1))
    assert wide.exact == pytest.approx([0.5, 0.4, 0.3])
    assert broken.learning_rate is None
    assert len(broken.errors) == 2
    assert best_rate("broken", study.runs) is None


def test_it_says_who_is_ahead_and_how_often(study: Study) -> None:
    assert [row.name for row in study.ranking] == ["narrow", "wide"]
    assert study.summary() == (
        "lowest held-out loss: narrow at rank 2, 0.5667 ± 0.2082; then wide at rank 2, 0.6000 ± 0.1000. "
        "With the same seed narrow is ahead in 2 of 3"
    )
    one = study.model_copy(update={"rows": [row.model_copy(update={"losses": row.losses[:1]}) for row in study.rows]})
    assert one.summary().endswith("One seed cannot say how much of the difference is chance")


def test_it_says_what_may_change_the_order(study: Study) -> None:
    highest, lowest, left_out = study.notes()
    assert "highest" in highest
    assert highest.endswith(": wide")
    assert lowest.endswith(": narrow")
    assert left_out.endswith(": mlp")
    alone = study.model_copy(update={"learning_rates": [1e-3], "left_out": []})
    assert alone.notes() == []


def test_the_table_has_means_and_spreads_and_the_base(study: Study) -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(study.table())
    text = console.export_text()
    assert "…" not in text
    for expected in ("after 7 steps", "3 seeds", "0.6000 ± 0.1000", "40.0% ± 10.0%", "failed", "2.0000", "base alone"):
        assert expected in text


def test_the_picture_shows_every_seed_of_what_worked(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.figure import Figure

    drawn: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (drawn.append(self), save(self, *a, **k))[1])
    draw_study(study, tmp_path / "plan.png")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    losses, exact = drawn[0].axes
    assert [label.get_text() for label in losses.get_yticklabels()] == ["wide, r=2", "narrow, r=2"]
    points = [list(line.get_xdata()) for line in losses.lines]
    assert points == [[0.5, 0.6, 0.7], [0.4, 0.8, 0.5]]
    assert len(exact.patches) == 2
