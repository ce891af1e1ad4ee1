"""Passes that take turns: all meet before any goes on, and none is left waiting."""

from __future__ import annotations

import threading
import time

import pytest

from lora_deploy.errors import UsageError
from lora_deploy.requantize.turns import Turns


@pytest.mark.parametrize("count", [1, 2, 7])
def test_all_meet_before_any_goes_on(count: int) -> None:
    turns, log = Turns(count), []

    def one_pass(number: int) -> list[int]:
        sums = []
        for place in range(3):
            log.append((place, number))
            sums.append(turns.meet(number, str(place), number + place, sum))
        return sums

    expected = [sum(number + place for number in range(count)) for place in range(3)]
    assert turns.run(one_pass) == [expected] * count
    # In order of the passes at each place, and no place is begun before the one before it is done.
    assert log == [(place, number) for place in range(3) for number in range(count)]


@pytest.mark.parametrize("failing", [0, 1, 3])
def test_the_failure_of_one_is_the_failure_of_all(failing: int) -> None:
    turns, went_on = Turns(4), []

    def one_pass(number: int) -> None:
        if number == failing:
            raise OSError(f"pass {number}")
        turns.meet(number, "a", None, len)
        went_on.append(number)

    with pytest.raises(OSError, match=f"pass {failing}"):
        turns.run(one_pass)
    assert went_on == []
    assert not any("(work)" in thread.name for thread in threading.enumerate())


def test_a_failure_in_what_is_done_for_all_ends_all() -> None:
    turns = Turns(3)

    def fail(values: object) -> None:
        raise ValueError("done for all")

    with pytest.raises(ValueError, match="done for all"):
        turns.run(lambda number: turns.meet(number, "a", None, fail))


def test_an_interrupt_while_waiting_ends_all(monkeypatch: pytest.MonkeyPatch) -> None:
    turns, ended = Turns(2), threading.Event()

    def interrupt(self: threading.Thread, timeout: float | None = None) -> None:
        raise KeyboardInterrupt

    def one_pass(number: int) -> None:
        try:
            if number == 0:
                turns.meet(number, "a", None, len)
            else:
                ended.wait(10)
        finally:
            ended.set()

    monkeypatch.setattr(threading.Thread, "join", interrupt)
    with pytest.raises(KeyboardInterrupt):
        turns.run(one_pass)
    assert ended.wait(10)


def test_nothing_goes_on_once_an_interrupt_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    turns, own, interrupted, done = Turns(1), threading.Thread.join, threading.Event(), []

    def join(self: threading.Thread, timeout: float | None = None) -> None:
        if not interrupted.is_set():
            interrupted.set()
            raise KeyboardInterrupt
        own(self, timeout)

    def one_pass(number: int) -> None:
        interrupted.wait(10)
        time.sleep(0.2)
        done.append(number)

    monkeypatch.setattr(threading.Thread, "join", join)
    with pytest.raises(KeyboardInterrupt):
        turns.run(one_pass)
    assert done == [0]


@pytest.mark.parametrize("short", [0, 1, 2])
def test_other_ways_through_the_model_are_refused(short: int) -> None:
    ways, early = Turns(3), Turns(3)
    with pytest.raises(UsageError, match="another way"):
        ways.run(lambda number: ways.meet(number, "ab"[number == short], None, len))
    with pytest.raises(UsageError, match="another way"):
        early.run(lambda number: early.meet(number, "a", None, len) if number != short else None)
