"""SIGKILL in training, and a run that goes on from the last whole checkpoint to the same weights, bit for bit."""

from __future__ import annotations

import errno
import random
import signal
import time
from collections.abc import Iterable

import pytest

from tests.faults.forks import ANY, SPACE
from tests.faults.scenes import assert_one_message_or_none
from tests.faults.tally import Tally
from tests.faults.training import Training

KIND = "kill in training, then resume"


def _kill_at(training: Training, k: int, tally: Tally) -> str | None:
    training.reset()
    ended = training.run(k=k, mode="kill")
    assert ended.code == -9, ended
    wrong = training.goes_on()
    tally(KIND, not wrong)
    return f"killed before call {k} of {len(training.calls)}, {ended.calls[-1]}: {wrong}" if wrong else None


def _kill(training: Training, places: Iterable[int], tally: Tally) -> None:
    wrong = [message for k in places if (message := _kill_at(training, k, tally))]
    assert not wrong, "\n".join(wrong)


def _of_checkpoint(training: Training, step: int) -> list[int]:
    """The calls that write or remove a checkpoint."""
    name = f"/checkpoint-{step}"
    return [k for k, call in enumerate(training.calls, 1) if f"{name}/" in call.path or call.path.endswith(name)]


def test_a_kill_inside_the_writing_of_a_checkpoint(training: Training, tally: Tally) -> None:
    """At its first and its last call, and where the Trainer's state, the mark of a whole one, is half there."""
    of_second = [k for k in _of_checkpoint(training, 2) if training.calls[k - 1].name not in ("unlink", "rmdir")]
    state = [k for k in of_second if training.calls[k - 1].path.endswith("trainer_state.json")]
    _kill(training, sorted({of_second[0], of_second[len(of_second) // 2], *state}), tally)


@pytest.mark.slow
def test_a_kill_at_many_calls_of_training(training: Training, tally: Tally) -> None:
    """Every call of the second checkpoint, and each tenth of the others."""
    _kill(training, sorted({*_of_checkpoint(training, 2), *range(1, len(training.calls) + 1, 10)}), tally)


@pytest.mark.slow
def test_kills_of_training_at_random_moments(training: Training, tally: Tally) -> None:
    moments = random.Random(5)
    start = time.monotonic()
    training.run()
    duration = time.monotonic() - start
    wrong = []
    for _ in range(20):
        training.reset()
        after = moments.uniform(0, duration)
        running = training.start()
        time.sleep(after)
        running.signal(signal.SIGKILL)
        ended = running.wait()
        assert ended.code in (-9, 0)
        message = training.goes_on()
        tally(KIND, not message)
        wrong += [f"killed after {after:.3f} s, {ended.calls[-1:]}: {message}"] if message else []
    assert not wrong, "\n".join(wrong)


def _fail_at(training: Training, k: int, mode: str, error: int, tally: Tally) -> str | None:
    kind = "disk full at the k-th write" if error == errno.ENOSPC else "input/output error"
    training.reset()
    ended = training.run(k=k, mode=mode, error=error, kinds=SPACE if error == errno.ENOSPC else ANY)
    try:
        assert_one_message_or_none(ended, 0, 5)
        wrong = "" if ended.code or training.result() == training.expected else "exit 0 and other weights"
        wrong = wrong or training.goes_on()
    except AssertionError as caught:
        wrong = str(caught)
    tally(kind, not wrong)
    return f"{kind} ({mode}) at call {k}, {ended.calls[k - 1 : k]}: {wrong}" if wrong else None


def _fail(training: Training, parts: int, mode: str, error: int, tally: Tally) -> None:
    count = len(training.run(kinds=SPACE if error == errno.ENOSPC else ANY).calls)
    places = sorted({1 + round(part * (count - 1) / (parts - 1)) for part in range(parts)})
    wrong = [message for k in places if (message := _fail_at(training, k, mode, error, tally))]
    assert not wrong, f"{len(wrong)} of {len(places)}:\n" + "\n".join(wrong)


@pytest.mark.slow
def test_a_full_disk_in_training(training: Training, tally: Tally) -> None:
    _fail(training, 4, "staying", errno.ENOSPC, tally)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["once", "staying"])
@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
def test_a_broken_disk_in_training_at_many_calls(mode: str, error: int, training: Training, tally: Tally) -> None:
    _fail(training, 40, mode, error, tally)
