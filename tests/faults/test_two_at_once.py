"""Two processes that write the same output: one after the other or one of them refused, and never a mixture."""

from __future__ import annotations

import itertools
import random
import signal
import time

import pytest

from tests.commands import tree
from tests.faults.forks import Ended, Fault
from tests.faults.scenes import Scene, SceneFactory, assert_one_message_or_none
from tests.faults.tally import Tally

KIND = "two exporters at once"
Tree = dict[str, tuple[int, str]]
# Longer than the second command takes, if it doesn't wait for the first.
_PATIENCE_S = 3.0


def _alone(scene: Scene, *commands: list[object]) -> Tree:
    """What the commands leave one after the other."""
    scene.reset()
    for command in commands:
        assert scene.faulty.run(*command).code == 0
    return tree(scene.place)


def _outcomes(scene: Scene, commands: list[list[object]]) -> dict[tuple[int, ...], list[Tree]]:
    """What may be there, by which of the commands came to their end; in any order."""
    both = [_alone(scene, *order) for order in itertools.permutations(commands)]
    first, second = ([_alone(scene, command)] for command in commands)
    # 3 is what `adapter convert` answers where the export that it was for has been replaced meanwhile.
    return {(0, 5): first, (0, 3): first, (5, 0): second, (3, 0): second, (0, 0): both}


def _race(scene: Scene, commands: list[list[object]], stop_at: int, pause: float) -> list[Ended]:
    """Start both, and hold the first one at a call until the second has ended, unless the second waits for it."""
    scene.reset()
    arm = Fault(scene.place, stop_at, "stop" if stop_at else "once")
    first = scene.faulty.start(*commands[0], arm=arm)
    if stop_at:
        first.wait_until_stopped()
    time.sleep(pause)
    second = scene.faulty.start(*commands[1])
    if stop_at:
        second.wait_until_gone(_PATIENCE_S)
        first.signal(signal.SIGCONT)
    return [first.wait(), second.wait()]


def _judge(scene: Scene, ended: list[Ended], outcomes: dict[tuple[int, ...], list[Tree]], tally: Tally) -> str | None:
    found = tree(scene.place)
    codes = tuple(one.code for one in ended)
    survived = found in outcomes.get(codes, [])
    trouble = ""
    try:
        for one in ended:
            assert_one_message_or_none(one, 0, 3, 5)
    except AssertionError as error:
        survived, trouble = False, str(error)
    tally(KIND, survived)
    return None if survived else f"exits {codes}, {sorted(found)}: {trouble}"


def _races(scene: Scene, commands: list[list[object]], stops: list[int], pauses: list[float], tally: Tally) -> None:
    outcomes = _outcomes(scene, commands)
    wrong = []
    for stop, pause in [*((stop, 0.0) for stop in stops), *((0, pause) for pause in pauses)]:
        message = _judge(scene, _race(scene, commands, stop, pause), outcomes, tally)
        wrong += [f"first held at call {stop}, second {pause:.3f} s later: {message}"] if message else []
    assert not wrong, "\n".join(wrong)


def _stops(scene: Scene, parts: int) -> list[int]:
    """Some calls; one of them is the first that touches the output."""
    first = next(k for k, call in enumerate(scene.calls, 1) if scene.touches(call))
    spread = {2 + round(part * (len(scene.calls) - 2) / max(1, parts - 1)) for part in range(parts)}
    return sorted(spread | {first, min(first + 1, len(scene.calls))})


@pytest.mark.parametrize("new", [True, False])
def test_two_exports_at_once(new: bool, scene: SceneFactory, tally: Tally) -> None:
    made = scene("merge", new)
    _races(made, [made.command(), made.another()], _stops(made, 1), [0.0], tally)


# The other export has another fingerprint: an adapter that was converted for the older one does not fit it.
def test_an_export_and_a_conversion_at_once(scene: SceneFactory, tally: Tally) -> None:
    made = scene("convert")
    _races(made, [made.command(), made.another("fp4")], _stops(made, 1), [0.0], tally)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "new", "method"),
    [("merge", True, "nf4"), ("merge", False, "nf4"), ("branch", False, "nf4"), ("convert", False, "fp4")],
)
def test_two_at_once_at_many_moments(kind: str, new: bool, method: str, scene: SceneFactory, tally: Tally) -> None:
    made = scene(kind, new)
    pauses = [random.Random(kind).uniform(0, 0.5) for _ in range(15)]
    _races(made, [made.command(), made.another(method)], _stops(made, 12), pauses, tally)
    _races(made, [made.another(method), made.command()], [], pauses, tally)
