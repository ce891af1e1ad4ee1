"""A disk that is full, broken or read-only at any call: exit 5, one message, and everything as it was before."""

from __future__ import annotations

import errno
from collections.abc import Iterable

import pytest

from tests.faults.forks import ANY, SPACE
from tests.faults.scenes import Scene, SceneFactory, assert_one_message_or_none
from tests.faults.tally import Tally

SCENES = [("merge", True), ("merge", False), ("branch", True), ("branch", False), ("convert", False)]
SCENES += [("verified", True), ("verified", False), ("int4", True), ("fixed", False)]
BROKEN = {"input/output error": errno.EIO, "read-only or vanished directory": errno.EROFS}


def _full_at(scene: Scene, k: int, mode: str, tally: Tally) -> str | None:
    """No room at the k-th call that needs some; what is wrong afterwards."""
    scene.reset()
    ended = scene.run(k, mode, errno.ENOSPC, SPACE)
    state = scene.state(leftovers=False)  # a full disk lets files be removed
    survived = state == ("new" if ended.code == 0 else "old")
    try:
        assert_one_message_or_none(ended, 0, 5)
    except AssertionError as error:
        survived, state = False, f"{state}; {error}"
    tally("disk full at the k-th write", survived)
    # Of the calls, the one that failed and not those that cleaned up after it.
    return None if survived else f"full ({mode}) at call {k}, {ended.calls[k - 1 : k]}: exit {ended.code}, {state}"


def _fill(scene: Scene, places: Iterable[int], mode: str, tally: Tally) -> None:
    wrong = [message for k in places if (message := _full_at(scene, k, mode, tally))]
    assert not wrong, f"{len(wrong)} times:\n" + "\n".join(wrong)


def _some(count: int, parts: int) -> list[int]:
    """The first of `count` calls, the last, and some in between."""
    return sorted({1 + round(part * (count - 1) / (parts - 1)) for part in range(parts)})


@pytest.mark.parametrize("mode", ["once", "staying"])
@pytest.mark.parametrize(("kind", "new"), [("merge", True), ("branch", False), ("convert", False), ("int4", True)])
def test_a_full_disk_at_some_writes(kind: str, new: bool, mode: str, scene: SceneFactory, tally: Tally) -> None:
    made = scene(kind, new)
    _fill(made, _some(made.count(SPACE), 4), mode, tally)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["once", "staying"])
@pytest.mark.parametrize(("kind", "new"), SCENES)
def test_a_full_disk_at_every_write(kind: str, new: bool, mode: str, scene: SceneFactory, tally: Tally) -> None:
    made = scene(kind, new)
    count = made.count(SPACE)
    made.reset()
    assert made.run(count + 1, mode, errno.ENOSPC, SPACE).code == 0  # the first k that nothing is left to fail at
    _fill(made, range(1, count + 1), mode, tally)


def _break_at(scene: Scene, k: int, mode: str, fault: str, tally: Tally) -> str | None:
    """As `_full_at`, but where nothing can be removed either the next command does it."""
    scene.reset()
    ended = scene.run(k, mode, BROKEN[fault], ANY)
    state = scene.state(leftovers=True)
    survived = state == ("new" if ended.code == 0 else "old")
    try:
        assert_one_message_or_none(ended, 0, 5)
        recovered = scene.recovers()
    except AssertionError as error:
        recovered = str(error)
    tally(fault, survived and recovered == "new")
    if survived and recovered == "new":
        return None
    return f"{fault} ({mode}) at call {k}, {ended.calls[k - 1 : k]}: exit {ended.code}, {state}, then {recovered}"


def _break(scene: Scene, parts: int, mode: str, fault: str, tally: Tally) -> None:
    places = _some(len(scene.calls), parts)
    wrong = [message for k in places if (message := _break_at(scene, k, mode, fault, tally))]
    assert not wrong, f"{len(wrong)} of {len(places)}:\n" + "\n".join(wrong)


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_disk_at_some_calls(fault: str, scene: SceneFactory, tally: Tally) -> None:
    mode = "once" if fault == "input/output error" else "staying"
    _break(scene("branch"), 4, mode, fault, tally)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["once", "staying"])
@pytest.mark.parametrize("fault", BROKEN)
@pytest.mark.parametrize(("kind", "new"), SCENES)
def test_a_broken_disk_at_many_calls(
    kind: str, new: bool, fault: str, mode: str, scene: SceneFactory, tally: Tally
) -> None:
    _break(scene(kind, new), 12, mode, fault, tally)
