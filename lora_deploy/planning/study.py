"""The choices trained side by side, one after another or several at once."""

from __future__ import annotations

import json
import multiprocessing
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from lora_deploy.compare.picture import can_draw
from lora_deploy.errors import OutputError, UsageError
from lora_deploy.integrity import hash_file
from lora_deploy.planning.choices import Choice
from lora_deploy.planning.held_out import split_data
from lora_deploy.planning.options import StudyOptions
from lora_deploy.planning.picture import PICTURE_NAME, draw_study
from lora_deploy.planning.plan import Plan
from lora_deploy.planning.report import REPORT_NAME, Study, best_rate
from lora_deploy.planning.runs import Run, RunResult, do_run, judge_base, open_base, open_held_out, read_result

__all__ = ["run_study"]

_SETTINGS = "settings.json"
_OURS = ("data", "runs", "base.json", _SETTINGS, REPORT_NAME, PICTURE_NAME)

OnProgress = Callable[[str, int, int], None]


def run_study(plan: Plan, options: StudyOptions, *, on_progress: OnProgress = lambda task, done, total: None) -> Study:
    """Train the choices of a plan on the user's data and judge each on rows that none was trained on.

    Every choice is trained at every learning rate with the first seed, and with the other seeds at the one at which its
    held-out loss is then lowest.

    A run that is finished is not done again: the same call goes on after an interruption, and a call with more seeds,
    learning rates or choices adds them. `output` gets `plan.json`, `plan.png`, and every adapter under `runs/`.

    Args:
        plan: Of the same model.
        options: What to train, on what.
        on_progress: Is told what is being done, how much of it is done and of how much.

    Raises:
        UsageError: A choice is not in the plan, or the output holds a study with other settings.
        InputError: The base or the data is missing, damaged or does not fit.
        OutputError: The output holds something else, or could not be written.
        KeyboardInterrupt: Ctrl-C; the same call goes on.
    """
    choices = _chosen(plan, options.only)
    _check(options)
    _begin(plan, options)
    with _writing(options.output):
        train, held_out = _data(options)
    on_progress("base alone", 0, 1)
    base = judge_base(options, held_out)
    on_progress("base alone", 1, 1)

    def run(choice: Choice, rate: float, seed: int) -> Run:
        return Run(choice.name, tuple(choice.targets), choice.rank, rate, seed, train, held_out, options)

    first, *others = options.seeds
    total = len(choices) * (len(options.learning_rates) + len(others))
    results = _do(
        [run(choice, rate, first) for rate in options.learning_rates for choice in choices],
        0,
        total,
        options,
        on_progress,
    )
    best = [(choice, best_rate(choice.name, results)) for choice in choices]
    second = [run(choice, rate, seed) for seed in others for choice, rate in best if rate is not None]
    results += _do(second, len(results), total, options, on_progress)
    left_out = [row.name for row in plan.rows if not row.fair] if not options.only else []
    study = Study.of(plan, options, choices, base, results, left_out)
    _write(study, options.output)
    return study


def _chosen(plan: Plan, only: Sequence[str]) -> list[Choice]:
    """The choices that are trained."""
    by_name = {choice.name: choice for choice in plan.choices}
    for name in only:
        if name not in by_name:
            raise UsageError("there is no such choice", found=name, expected=", ".join(by_name))
    return [by_name[name] for name in only] if only else [choice for choice in plan.choices if choice.fair]


def _check(options: StudyOptions) -> None:
    """Everything that can be wrong with base, data and options, before anything is written."""
    base = open_base(options)
    for file in (options.data, options.held_out):
        if file is not None:
            open_held_out(options, base, file)
    for rate in options.learning_rates:
        for seed in options.seeds:
            options.training(["x"], 1, rate, seed, options.data, options.output)


def _begin(plan: Plan, options: StudyOptions) -> None:
    """Make the directory, or see that what is there is the same study."""
    output, file = options.output, options.output / _SETTINGS
    held = None if options.held_out is None else hash_file(options.held_out)
    settings: dict[str, Any] = options.that_matter() | {
        "budget": plan.budget,
        "data_sha256": hash_file(options.data),
        "held_out_sha256": held,
        "base_sha256": open_base(options).sha256(),
    }
    with _writing(output):
        if output.exists() and not output.is_dir():
            raise OutputError("the output is a file", file=output, expected="a directory that is new or empty")
        before = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
        if output.is_dir() and before is None and any(output.iterdir()):
            raise OutputError(
                "the output exists",
                file=output,
                found="other files",
                expected="a directory that is new or empty, or holds this study",
                remedy="choose another --output",
            )
        if before is not None and options.overwrite:
            _clear(output)
        elif before is not None:
            _compare(before, settings, file)
        output.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _clear(output: Path) -> None:
    for name in _OURS:
        path = output / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _compare(before: dict[str, Any], now: dict[str, Any], file: Path) -> None:
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name):
            raise UsageError(
                "a study can only go on with the settings and the data that it began with",
                file=file,
                tensor=name,
                found=now.get(name),
                expected=before.get(name),
                remedy="give the same options as the first time, choose another --output, or add --overwrite",
            )


def _data(options: StudyOptions) -> tuple[Path, Path]:
    """The rows to train on and those to judge on."""
    if options.held_out is not None:
        return options.data, options.held_out
    directory = options.output / "data"
    train, held_out = directory / "train.jsonl", directory / "held_out.jsonl"
    directory.mkdir(parents=True, exist_ok=True)
    split_data(options.data, options.held_out_fraction, train, held_out)
    return train, held_out


def _do(
    runs: Sequence[Run], before: int, total: int, options: StudyOptions, on_progress: OnProgress
) -> list[RunResult]:
    """The result of every run, in the order of the runs; those that are finished are only read.

    Args:
        runs: What is to be done.
        before: Runs that were done before, of all.
        total: All runs of the study.
        options: Of the study.
        on_progress: Is told after each.
    """
    results = {run: result for run in runs if (result := read_result(run)) is not None}
    missing = [run for run in runs if run not in results]
    on_progress("training", before + len(results), total)
    for run, result in _results(missing, min(options.jobs, len(missing))):
        results[run] = result
        on_progress("training", before + len(results), total)
    return [results[run] for run in runs]


def _results(runs: Sequence[Run], jobs: int) -> Iterator[tuple[Run, RunResult]]:
    if jobs <= 1:
        for run in runs:
            yield run, do_run(run)
        return
    # Not forked: threads of torch and the memory of a GPU do not survive it.
    threads = max(1, torch.get_num_threads() // jobs)
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        waiting = {pool.submit(do_run, run, threads): run for run in runs}
        try:
            for done in as_completed(waiting):
                yield waiting[done], done.result()
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _write(study: Study, output: Path) -> None:
    """Picture and numbers; the numbers come last."""
    with _writing(output):
        if can_draw():
            draw_study(study, output / PICTURE_NAME)
        study.save(output)


@contextmanager
def _writing(output: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError("the study could not be written", file=output, found=error.strerror or str(error)) from error
    except json.JSONDecodeError as error:
        raise OutputError(
            "the study's settings are damaged",
            file=output / _SETTINGS,
            found=str(error),
            remedy="choose another --output",
        ) from error
