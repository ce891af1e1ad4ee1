"""The choices trained: every run once, whatever happens in between, and judged on what none was trained on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lora_deploy.adapter.files import WEIGHTS_NAME
from lora_deploy.errors import DataError, DivergenceError, OutputError, UsageError
from lora_deploy.planning import Plan, runs, study
from lora_deploy.planning.held_out import HeldOut, judge, split_data
from lora_deploy.planning.runs import open_base
from lora_deploy.planning.study import run_study
from lora_deploy.train import TrainOptions, train_adapter
from lora_deploy.train.loop import load_tokenizer
from lora_deploy.train.trainer import AdapterTrainer
from tests.planning.conftest import MakeStudy
from tests.train.conftest import calls, write_jsonl


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The runs that were trained, not read, in order."""
    found: list[str] = []
    real = study.do_run

    def do_run(run: runs.Run, threads: int | None = None) -> runs.RunResult:
        found.append(f"{run.choice} {run.learning_rate:g} {run.seed}")
        return real(run, threads)

    monkeypatch.setattr(study, "do_run", do_run)
    return found


def _adapters(output: Path) -> dict[str, bytes]:
    return {str(file.relative_to(output)): file.read_bytes() for file in output.glob(f"runs/**/{WEIGHTS_NAME}")}


def test_a_study_is_done_once_and_goes_on(plan: Plan, options: MakeStudy, trained: list[str]) -> None:
    asked = options()
    found = run_study(plan, asked)
    first = ["q_proj 0.001 0", "all-linear 0.001 0", "q_proj 0.01 0", "all-linear 0.01 0"]
    best = {row.name: row.learning_rate for row in found.rows}
    assert trained == [*first, *(f"{name} {best[name]:g} 1" for name in ("q_proj", "all-linear"))]

    # what is in the table is what the runs say
    for row in found.rows:
        by_rate = {run.learning_rate: run for run in found.runs if run.choice == row.name and run.seed == 0}
        losses = {rate: run.judgement.loss for rate, run in by_rate.items() if run.judgement is not None}
        assert row.learning_rate == min(losses, key=lambda rate: losses[rate])
        assert row.loss_by_rate == {f"{rate:g}": loss for rate, loss in losses.items()}
        assert len(row.losses) == len(row.exact) == 2
        assert row.losses[0] == min(losses.values())
        assert row.loss == pytest.approx(sum(row.losses) / 2)
        assert row.loss_spread == pytest.approx(abs(row.losses[0] - row.losses[1]) / 2**0.5)
        assert all(run.parameters == row.parameters and run.steps == 2 for run in by_rate.values())
    assert found.rows[0].losses != found.rows[1].losses
    assert found.rows[0].losses[0] != found.rows[0].losses[1]
    written = json.loads((asked.output / "plan.json").read_text())
    assert written == json.loads(found.model_dump_json())
    assert (asked.output / "plan.png").read_bytes().startswith(b"\x89PNG")
    assert not list(asked.output.glob("runs/**/checkpoints"))

    # one result is lost: that run alone is done again, and ends with the same bytes
    before = _adapters(asked.output)
    assert len(before) == 6
    (asked.output / "runs" / "q_proj-r8" / "rate-0.01" / "seed-0" / "result.json").unlink()
    trained.clear()
    again = run_study(plan, asked)
    assert trained == ["q_proj 0.01 0"]
    assert [row.losses for row in again.rows] == [row.losses for row in found.rows]
    assert _adapters(asked.output) == before

    # more seeds are added to what is there
    trained.clear()
    more = run_study(plan, options(seeds=(0, 1, 2)))
    assert trained == [f"{name} {best[name]:g} 2" for name in ("q_proj", "all-linear")]
    assert [row.losses[:2] for row in more.rows] == [row.losses for row in found.rows]


def test_an_interrupted_run_goes_on_from_its_checkpoint(
    plan: Plan, options: MakeStudy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    once = {"only": ("q_proj",), "seeds": (0,), "learning_rates": (1e-2,), "steps": 4}
    straight = run_study(plan, options(**once, output=tmp_path / "straight"))
    step = AdapterTrainer.training_step
    steps: list[int] = []

    def interrupted(self: AdapterTrainer, *args: Any, **kwargs: Any) -> Any:
        steps.append(self.state.global_step)
        if self.state.global_step == 1 and len(steps) == 2:
            import signal

            signal.raise_signal(signal.SIGINT)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(AdapterTrainer, "training_step", interrupted)
    asked = options(**once)
    with pytest.raises(KeyboardInterrupt):
        run_study(plan, asked)
    assert not (asked.output / "plan.json").exists()
    assert steps == [0, 1]
    found = run_study(plan, asked)
    assert steps == [0, 1, 2, 3]
    assert found.rows[0].losses == straight.rows[0].losses
    assert list(_adapters(asked.output).values()) == list(_adapters(tmp_path / "straight").values())


def test_other_settings_and_other_data_are_refused_and_can_be_forced(
    plan: Plan, options: MakeStudy, trained: list[str], tmp_path: Path
) -> None:
    once = {"only": ("q_proj",), "seeds": (0,), "learning_rates": (1e-2,), "steps": 1}
    run_study(plan, options(**once))
    other = write_jsonl(tmp_path / "other.jsonl", calls(13))
    changes = {"steps": 3, "alpha": 8, "quantization": "nf4", "chat_template": False, "data": other}
    for name, value in changes.items():
        with pytest.raises(UsageError, match="can only go on with the settings") as caught:
            run_study(plan, options(**(once | {name: value})))
        assert caught.value.details["tensor"] == {"data": "data_sha256"}.get(name, name)
    assert trained == ["q_proj 0.01 0"]
    run_study(plan, options(**(once | {"alpha": 8, "overwrite": True})))
    assert trained == ["q_proj 0.01 0"] * 2


def test_what_is_in_the_way_is_left_alone(plan: Plan, options: MakeStudy) -> None:
    asked = options(overwrite=True)
    asked.output.mkdir()
    (asked.output / "thesis.txt").write_text("mine")
    with pytest.raises(OutputError, match="the output exists"):
        run_study(plan, asked)
    assert [file.name for file in asked.output.iterdir()] == ["thesis.txt"]


def test_an_unknown_choice_is_refused_before_anything_is_written(plan: Plan, options: MakeStudy) -> None:
    asked = options(only=("q_proj", "w_proj"))
    with pytest.raises(UsageError, match="no such choice") as caught:
        run_study(plan, asked)
    assert caught.value.details["found"] == "w_proj"
    assert "q_proj+v_proj" in caught.value.details["expected"]
    assert not asked.output.exists()


def test_bad_held_out_data_is_refused_before_anything_is_trained(
    plan: Plan, options: MakeStudy, tmp_path: Path, trained: list[str]
) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a"}\n')
    asked = options(held_out=bad)
    with pytest.raises(DataError, match="none of the three forms"):
        run_study(plan, asked)
    assert trained == []
    assert not asked.output.exists()


def test_a_rate_that_diverges_is_a_failed_run_and_not_the_end(
    plan: Plan, options: MakeStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = runs.train_adapter

    def train(asked: TrainOptions) -> Any:
        if asked.learning_rate == 1e-2:
            raise DivergenceError("the loss is not finite after step 1: the training diverged", found="nan")
        return real(asked)

    monkeypatch.setattr(runs, "train_adapter", train)
    found = run_study(plan, options(only=("q_proj",), seeds=(0,)))
    (row,) = found.rows
    assert row.learning_rate == 1e-3
    assert len(row.losses) == 1
    assert row.errors == ["learning rate 0.01, seed 0: the loss is not finite after step 1: the training diverged"]
    failed = run_study(plan, options(only=("q_proj",), seeds=(0,), learning_rates=(1e-2,)))
    assert failed.rows[0].learning_rate is None
    assert failed.summary() == "none of the runs could be judged"


def test_choices_that_are_off_the_budget_are_left_out_and_named(
    tiny_base: Callable[..., str], options: MakeStudy, trained: list[str]
) -> None:
    from lora_deploy.planning import make_plan

    plan = make_plan(tiny_base(), 400, memory=False)  # all-linear takes 1,952 at rank 1
    found = run_study(plan, options(only=(), seeds=(0,), learning_rates=(1e-3,), steps=1))
    assert found.left_out == [row.name for row in plan.rows if not row.fair]
    assert "all-linear" in found.left_out
    assert [row.name for row in found.rows] == [row.name for row in plan.rows if row.fair]


@pytest.mark.slow  # two processes import everything
def test_jobs_change_nothing_but_the_time(plan: Plan, options: MakeStudy, tmp_path: Path) -> None:
    once = {"seeds": (0,), "learning_rates": (1e-2,)}
    alone = run_study(plan, options(**once))
    together = run_study(plan, options(**once, jobs=2, output=tmp_path / "together"))
    assert [row.losses for row in together.rows] == [row.losses for row in alone.rows]
    assert _adapters(tmp_path / "together") == _adapters(tmp_path / "study")


def test_the_split_is_the_same_always_and_loses_nothing(tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "data.jsonl", calls(20))
    train, held_out = tmp_path / "train.jsonl", tmp_path / "held_out.jsonl"
    split_data(data, 0.25, train, held_out)
    parts = [file.read_text().splitlines() for file in (train, held_out)]
    assert [len(part) for part in parts] == [15, 5]
    assert sorted(parts[0] + parts[1]) == sorted(data.read_text().splitlines())
    split_data(data, 0.25, tmp_path / "again.jsonl", tmp_path / "held.jsonl")
    assert (tmp_path / "held.jsonl").read_text() == held_out.read_text()
    with pytest.raises(DataError, match="too few rows") as caught:
        split_data(write_jsonl(tmp_path / "one.jsonl", calls(1)), 0.25, train, held_out)
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("template", [True, False])
def test_an_adapter_that_learnt_the_answer_is_judged_right(options: MakeStudy, tmp_path: Path, template: bool) -> None:
    """Trained on one answer until it gives it; and the loss is the one that the training itself measures."""
    rows = [{"prompt": "x" * (1 + at % 3), "completion": "ab"} for at in range(8)]
    data = write_jsonl(tmp_path / "one.jsonl", rows)
    asked = options(data=data, chat_template=template, steps=40)
    training = asked.training(["q_proj", "up_proj", "down_proj", "o_proj"], 4, 3e-2, 0, data, tmp_path / "adapter")
    result = train_adapter(training.model_copy(update={"eval_data": data, "eval_steps": 40}))
    base = open_base(asked)
    held_out = HeldOut.load(data, load_tokenizer(base.directory), 64, chat_template=template, answers=5)
    found = judge(base, tmp_path / "adapter", held_out)
    assert found.answered == 5
    assert found.exact == 1.0
    assert found.loss == pytest.approx(result.eval_loss, rel=1e-3)
    alone = judge(base, None, held_out)
    assert alone.exact == 0.0
    assert alone.loss > 10 * found.loss
    # an answer that goes on, or stops too early, is not the answer
    for completion in ("aba", "a"):
        other = write_jsonl(tmp_path / "other.jsonl", [row | {"completion": completion} for row in rows])
        wrong = HeldOut.load(other, held_out.tokenizer, 64, chat_template=template, answers=5)
        assert judge(base, tmp_path / "adapter", wrong).exact == 0.0


def test_rows_without_prompts_have_a_loss_only(options: MakeStudy, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "text.jsonl", [{"text": "abc"}, {"text": "abcd"}])
    base = open_base(options(data=data))
    held_out = HeldOut.load(data, load_tokenizer(base.directory), 64, chat_template=True, answers=5)
    found = judge(base, None, held_out)
    assert (found.exact, found.answered) == (None, 0)
    assert found.loss > 1
