"""SIGKILL at any moment leaves the old output or the new one, whole, and the next run leaves nothing else."""

from __future__ import annotations

import random
import signal
import time

import pytest

from tests.faults.scenes import Scene, SceneFactory
from tests.faults.tally import Tally

# Of a first export, of one over an older one, and of an adapter that is added.
SCENES = [("merge", True), ("merge", False), ("branch", True), ("branch", False), ("fixed", False), ("convert", False)]
RANDOM_KILLS = 300


def _commit_steps(scene: Scene) -> list[int]:
    """The calls from the first one that touches the output itself, and one past the end."""
    inside = [number for number, call in enumerate(scene.calls, 1) if scene.touches(call)]
    return list(range(max(1, inside[0] - 1), len(scene.calls) + 2))


def _kill_at(scene: Scene, k: int, tally: Tally) -> str | None:
    """Kill before the k-th call; what is wrong afterwards."""
    scene.reset()
    ended = scene.run(k, "kill")
    assert ended.code == (-9 if k <= len(scene.calls) else 0), ended
    state = scene.state(leftovers=True)
    recovered = scene.recovers()
    tally("kill at a commit step", state in ("old", "new") and recovered == "new")
    where = f"killed before call {k} of {len(scene.calls)}, {ended.calls[-1]}"
    if state not in ("old", "new"):
        return f"{where}: {state}"
    return None if recovered == "new" else f"{where}: then {recovered}"


@pytest.mark.parametrize(("kind", "new"), SCENES)
def test_a_kill_at_some_steps_of_the_commit(kind: str, new: bool, scene: SceneFactory, tally: Tally) -> None:
    made = scene(kind, new)
    steps = _commit_steps(made)
    tried = sorted({1, steps[0], steps[1], steps[len(steps) // 2], steps[-2]} & set(range(1, len(made.calls) + 2)))
    wrong = [message for k in tried if (message := _kill_at(made, k, tally))]
    assert not wrong, "\n".join(wrong)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "new"), SCENES)
def test_a_kill_at_every_call(kind: str, new: bool, scene: SceneFactory, tally: Tally) -> None:
    """From the first directory that is made to one past the last file that is removed."""
    made = scene(kind, new)
    wrong = [message for k in range(1, len(made.calls) + 2) if (message := _kill_at(made, k, tally))]
    assert not wrong, f"{len(wrong)} of {len(made.calls) + 1}:\n" + "\n".join(wrong)


def _kill_at_random(scene: Scene, moments: random.Random, duration: float, tally: Tally) -> str | None:
    scene.reset()
    after = moments.uniform(0, duration)
    running = scene.start()
    time.sleep(after)
    running.signal(signal.SIGKILL)
    ended = running.wait()
    assert ended.code in (-9, 0)
    state = scene.state(leftovers=True)
    recovered = scene.recovers()
    survived = recovered == "new" and state in (("new",) if ended.code == 0 else ("old", "new"))
    tally("kill at a random moment", survived)
    return None if survived else f"killed after {after:.3f} s, {ended.calls[-1:]}: {state}, then {recovered}"


def _kill_often(scene: SceneFactory, tally: Tally, kills: int) -> None:
    moments = random.Random(11)
    wrong = []
    for kind, new in SCENES:
        made = scene(kind, new)
        start = time.monotonic()
        made.run()
        duration = time.monotonic() - start
        for _ in range(kills // len(SCENES)):
            message = _kill_at_random(made, moments, duration, tally)
            wrong += [message] if message else []
    assert not wrong, f"{len(wrong)} of {kills}:\n" + "\n".join(wrong)


def test_some_kills_at_random_moments(scene: SceneFactory, tally: Tally) -> None:
    _kill_often(scene, tally, 5)


@pytest.mark.slow
def test_kills_at_random_moments(scene: SceneFactory, tally: Tally) -> None:
    _kill_often(scene, tally, RANDOM_KILLS)
