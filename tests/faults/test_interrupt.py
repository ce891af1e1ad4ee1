"""Ctrl-C at any moment: exit 130 and one line; an export leaves nothing, a training run can be resumed."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time

import pytest

from tests.faults.forks import Ended
from tests.faults.scenes import Scene, SceneFactory
from tests.faults.tally import Tally
from tests.faults.training import Training

KIND = "Ctrl-C"
SCENES = [("merge", True), ("branch", False), ("convert", False)]


def _judge(scene: Scene, ended: Ended, tally: Tally) -> str | None:
    """What is wrong: a command that was interrupted leaves everything as it was, unless its work was done already."""
    state = scene.state(leftovers=False)
    if ended.code == 0:
        survived = state == "new" and not ended.err
    else:
        done = any(scene.touches(call) for call in ended.calls)
        survived = state in (("old", "new") if done else ("old",))
        survived = survived and (ended.code, ended.out, ended.err) == (130, "", "lora-deploy: interrupted\n")
    tally(KIND, survived)
    return None if survived else f"at {ended.calls[-1:]}: exit {ended.code}, {state}, {ended.err!r}"


def _at_calls(scene: Scene, parts: int, tally: Tally) -> list[str]:
    wrong = []
    for k in sorted({1 + round(part * (len(scene.calls) - 1) / (parts - 1)) for part in range(parts)}):
        scene.reset()
        message = _judge(scene, scene.run(k, "interrupt"), tally)
        wrong += [f"call {k} of {len(scene.calls)}, {scene.calls[k - 1]}: {message}"] if message else []
    return wrong


def _at_random(scene: Scene, count: int, tally: Tally) -> list[str]:
    moments = random.Random(3)
    start = time.monotonic()
    scene.run()
    duration = time.monotonic() - start
    wrong = []
    for _ in range(count):
        scene.reset()
        after = moments.uniform(0.03, duration)  # a fork that has not begun ignores it
        running = scene.start()
        time.sleep(after)
        running.signal(signal.SIGINT)
        message = _judge(scene, running.wait(), tally)
        wrong += [f"after {after:.3f} s, {message}"] if message else []
    return wrong


@pytest.mark.parametrize(("kind", "new"), SCENES)
def test_ctrl_c_in_export(kind: str, new: bool, scene: SceneFactory, tally: Tally) -> None:
    made = scene(kind, new)
    wrong = [*_at_calls(made, 4, tally), *_at_random(made, 1, tally)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "new"), [*SCENES, ("merge", False), ("branch", True)])
def test_ctrl_c_in_export_at_many_moments(kind: str, new: bool, scene: SceneFactory, tally: Tally) -> None:
    made = scene(kind, new)
    wrong = [*_at_calls(made, len(made.calls), tally), *_at_random(made, 20, tally)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.slow
def test_ctrl_c_in_a_process_from_its_start(scene: SceneFactory, tally: Tally) -> None:
    """No fork: what the imports make of an interrupt shows only here."""
    made = scene("merge", True)
    command = [sys.executable, "-m", "lora_deploy", *map(str, made.command())]
    wrong = []
    for after in (0.8, 1.5, 2.2, 3.0, 4.0, 5.0, 6.5, 8.0):
        made.reset()
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            time.sleep(after)
            process.send_signal(signal.SIGINT)
            out, err = process.communicate()
        # Where the signal came inside an `exec` (a dataclass is made), CPython ends itself by it: 130 to a shell.
        code = 130 if process.returncode == -signal.SIGINT else process.returncode
        message = _judge(made, Ended(code, out, err, [], None, []), tally)
        wrong += [f"after {after} s, {message}"] if message else []
    assert not wrong, "\n".join(wrong)


def _interrupt_training(training: Training, after: float | None, k: int, tally: Tally) -> str | None:
    training.reset()
    running = training.start(k=k, mode="interrupt")
    if after is not None:
        time.sleep(after)
        running.signal(signal.SIGINT)
    ended = running.wait()
    wrong = ""
    if ended.code != 0 and (ended.code, ended.out, ended.err) != (130, "", "lora-deploy: interrupted\n"):
        wrong = f"exit {ended.code}, {ended.out!r}, {ended.err!r}"
    wrong = wrong or training.goes_on()
    tally(KIND, not wrong)
    return f"after {after} s or at call {k}, {ended.calls[k - 1 : k]}: {wrong}" if wrong else None


def _in_training(training: Training, parts: int, count: int, tally: Tally) -> None:
    moments = random.Random(4)
    wrong = []
    for part in range(parts):
        k = 1 + round(part * (len(training.calls) - 1) / (parts - 1))
        message = _interrupt_training(training, None, k, tally)
        wrong += [message] if message else []
    for _ in range(count):
        message = _interrupt_training(training, moments.uniform(0.05, 1.5), 0, tally)
        wrong += [message] if message else []
    assert not wrong, "\n".join(wrong)


def test_ctrl_c_in_training(training: Training, tally: Tally) -> None:
    _in_training(training, 3, 1, tally)


@pytest.mark.slow
def test_ctrl_c_in_training_at_many_moments(training: Training, tally: Tally) -> None:
    _in_training(training, 40, 20, tally)
