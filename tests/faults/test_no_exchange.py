"""A file system on which two directories cannot change places: the files of an export are moved one by one.

Whatever fails, the old export is put back. A kill in between may leave a mixture, which `verify` must tell.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable

import pytest

from lora_deploy.errors import InputError
from lora_deploy.integrity import check_files
from tests.faults.forks import SPACE
from tests.faults.scenes import Scene, SceneFactory, assert_one_message_or_none
from tests.faults.tally import Tally


def _made(kind: str, scene: SceneFactory) -> Scene:
    made = scene(kind, exchange=False)
    assert sum(call.name == "rename" and made.touches(call) for call in made.calls) > 2
    return made


def _full_at(scene: Scene, k: int, tally: Tally) -> str | None:
    scene.reset()
    ended = scene.run(k, "staying", errno.ENOSPC, SPACE)
    state = scene.state(leftovers=ended.code == 0)  # an older file that cannot be removed is in nobody's way
    survived = state == ("new" if ended.code == 0 else "old")
    tally("disk full at the k-th write", survived)
    assert_one_message_or_none(ended, 0, 5)
    return None if survived else f"full at call {k}, {ended.calls[k - 1 : k]}: exit {ended.code}, {state}"


def _interrupted_at(scene: Scene, k: int, tally: Tally) -> str | None:
    scene.reset()
    ended = scene.run(k, "interrupt")
    state = scene.state(leftovers=True)
    survived = state in ("old", "new") and ended.code in (0, 130)
    tally("Ctrl-C", survived)
    return None if survived else f"interrupted at call {k}, {scene.calls[k - 1]}: exit {ended.code}, {state}"


def _is_refused(scene: Scene) -> bool:
    try:
        check_files(scene.output)
    except InputError:
        return True
    return False


def _killed_at(scene: Scene, k: int, tally: Tally) -> str | None:
    """What verify lets pass must be the old export or the new one, up to files that belong to neither."""
    scene.reset()
    scene.run(k, "kill")
    state = scene.state(leftovers=True)
    told = state in ("old", "new") or _is_refused(scene)
    recovered = scene.recovers()
    tally("kill between files that are moved", told and recovered == "new")
    if told and recovered == "new":
        return None
    return f"killed before call {k}, {scene.calls[k - 1]}: {state}, then {recovered}"


def _commit(scene: Scene) -> list[int]:
    """The calls from the first that touches the output to the last."""
    inside = [k for k, call in enumerate(scene.calls, 1) if scene.touches(call)]
    return list(range(inside[0], inside[-1] + 1))


def _try(scene: Scene, places: Iterable[int], spaces: Iterable[int], tally: Tally) -> None:
    found = [_full_at(scene, k, tally) for k in spaces]
    for k in places:
        found += [_interrupted_at(scene, k, tally), _killed_at(scene, k, tally)]
    wrong = [message for message in found if message]
    assert not wrong, f"{len(wrong)} of {len(found)}:\n" + "\n".join(wrong)


def test_some_faults_between_the_files(scene: SceneFactory, tally: Tally) -> None:
    made = _made("merge", scene)
    steps, count = _commit(made), made.count(SPACE)
    _try(made, steps[2 :: len(steps) // 3], (count // 2, count - 4), tally)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["merge", "branch"])
def test_faults_at_every_call_between_the_files(kind: str, scene: SceneFactory, tally: Tally) -> None:
    made = _made(kind, scene)
    _try(made, _commit(made), range(1, made.count(SPACE) + 1), tally)
