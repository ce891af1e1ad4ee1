"""Directories that cannot be written to, or that go away while a command runs."""

from __future__ import annotations

import errno
import shutil
import signal
from pathlib import Path

import pytest

from tests.commands import tree
from tests.faults.forks import ANY, Fault
from tests.faults.scenes import Scene, SceneFactory, assert_one_message_or_none
from tests.faults.tally import Tally

KIND = "read-only or vanished directory"
PLACES = [("merge", True), ("branch", False)]


@pytest.mark.parametrize("error", [errno.EROFS, errno.EACCES])
@pytest.mark.parametrize(("kind", "new"), [*PLACES, ("convert", False)])
def test_a_directory_that_cannot_be_written_to(
    kind: str, new: bool, error: int, scene: SceneFactory, tally: Tally
) -> None:
    """Nothing under the parent of the output can be changed (by a fault: root may write everywhere)."""
    made = scene(kind, new)
    ended = made.run(1, "staying", error, ANY)
    tally(KIND, ended.code == 5 and made.state(leftovers=False) == "old")
    assert_one_message_or_none(ended, 5)
    assert made.state(leftovers=False) == "old"


def _run_while(scene: Scene, k: int, gone: Path, tally: Tally) -> str | None:
    """Take a directory away before the k-th call; what is wrong afterwards."""
    scene.reset()
    running = scene.start(k, "stop")
    assert running.wait_until_stopped()
    shutil.rmtree(gone)
    running.signal(signal.SIGCONT)
    ended = running.wait()
    state = _state(scene)
    wrong = state != ("new" if ended.code == 0 else "nothing")
    try:
        assert_one_message_or_none(ended, 0, 5)
    except AssertionError as error:
        wrong, state = True, f"{state}; {error}"
    tally(KIND, not wrong)
    return f"{gone.name} taken away before call {k}, {scene.calls[k - 1]}: {ended.code}, {state}" if wrong else None


def _state(scene: Scene) -> str:
    if not scene.place.exists() or not tree(scene.place):
        return "nothing"
    return scene.state(leftovers=False)


def _places(scene: Scene, parts: int) -> list[int]:
    """Calls up to the last rename into the output: what happens to it afterwards is no matter of the command's."""
    renames = [k for k, call in enumerate(scene.calls, 1) if call.name.startswith("rename") and scene.touches(call)]
    return sorted({2 + round(part * (renames[-1] - 2) / (parts - 1)) for part in range(parts)})


def _take_away(scene: Scene, parts: int, tally: Tally) -> None:
    wrong = []
    for gone in (scene.output, scene.place):
        for k in _places(scene, parts):
            if gone == scene.output and scene.new:
                continue
            message = _run_while(scene, k, gone, tally)
            wrong += [message] if message else []
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(("kind", "new"), PLACES)
def test_the_output_or_its_parent_goes_away(kind: str, new: bool, scene: SceneFactory, tally: Tally) -> None:
    _take_away(scene(kind, new), 3, tally)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "new"), PLACES)
def test_the_output_or_its_parent_goes_away_at_many_moments(
    kind: str, new: bool, scene: SceneFactory, tally: Tally
) -> None:
    _take_away(scene(kind, new), 25, tally)


@pytest.mark.parametrize("before", [True, False])
def test_the_working_directory_goes_away(before: bool, scene: SceneFactory, tmp_path: Path, tally: Tally) -> None:
    """All paths of the command are absolute, so it needs none."""
    made = scene("merge")
    here = tmp_path / "here"
    here.mkdir()
    running = made.start(1 if before else len(made.calls) // 2, "stop", cwd=here)
    assert running.wait_until_stopped()
    here.rmdir()
    running.signal(signal.SIGCONT)
    ended = running.wait()
    tally(KIND, ended.code == 0 and made.state(leftovers=False) == "new")
    assert ended.code == 0, ended.err
    assert made.state(leftovers=False) == "new"


def test_a_relative_output_in_a_directory_that_went_away(scene: SceneFactory, tmp_path: Path, tally: Tally) -> None:
    made = scene("merge")
    here = tmp_path / "here"
    here.mkdir()
    command = [Path("out") if part == made.output else part for part in made.command()]
    running = made.faulty.start(*command, arm=Fault(here, 5, "stop"), cwd=here)
    assert running.wait_until_stopped()
    shutil.rmtree(here)
    running.signal(signal.SIGCONT)
    ended = running.wait()
    tally(KIND, ended.code == 5 and not here.exists())
    assert_one_message_or_none(ended, 5)
    assert not here.exists()
