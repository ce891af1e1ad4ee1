"""Parts that are made beside one another: in order, bounded, and with the error that one thread would meet first."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
import torch

from lora_deploy.export import pipeline
from lora_deploy.export.pipeline import Job, Parts, in_order


@pytest.fixture(autouse=True)
def two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "_cores", lambda: 2)


class Watched:
    """Jobs that say how many of them are at work."""

    def __init__(self, count: int, values: int = 1, failing: tuple[int, ...] = ()) -> None:
        self.count, self.values, self.failing = count, values, failing
        self.asked = self.held = self.most = self.working = self.most_working = 0
        self.lock = threading.Lock()

    def jobs(self) -> Iterator[Job]:
        for number in range(self.count):
            self.asked += 1
            yield Job(self.values, lambda number=number: self.make(number), self.finish)  # type: ignore[misc]

    def make(self, number: int) -> Parts:
        with self.lock:
            self.held += self.values
            self.working += 1
            self.most, self.most_working = max(self.most, self.held), max(self.most_working, self.working)
        time.sleep(0.02 if number % 3 == 0 else 0.001)  # later ones are done first
        with self.lock:
            self.working -= 1
        if number in self.failing:
            raise ValueError(f"job {number}")
        return [(str(number), torch.tensor(torch.get_num_threads()))]

    def finish(self, parts: Parts) -> Parts:
        with self.lock:
            self.held -= self.values
        return parts


def test_jobs_run_side_by_side_and_come_out_in_order() -> None:
    watched, own = Watched(20), torch.get_num_threads()
    found = list(in_order(watched.jobs()))
    assert [name for name, _ in found] == [str(number) for number in range(20)]
    assert watched.most_working == 2
    assert {int(threads) for _, threads in found} == {1}  # torch's own threads would come on top of ours
    assert torch.get_num_threads() == own


def test_no_more_is_in_memory_than_the_bound_and_one_larger_job_runs_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "_BOUND", 20)
    for values, most in ((5, 15), (10, 20), (11, 11), (50, 50)):
        watched = Watched(8, values)
        assert len(list(in_order(watched.jobs()))) == 8
        assert watched.most == most


def test_jobs_are_asked_for_just_before_they_begin() -> None:
    watched = Watched(20)
    next(in_order(watched.jobs()))
    assert watched.asked <= 4


def test_the_first_error_is_raised_when_all_before_it_has_come_out() -> None:
    watched = Watched(12, failing=(4, 5, 7))
    found: list[str] = []
    with pytest.raises(ValueError, match="job 4"):
        found += [name for name, _ in in_order(watched.jobs()) if not found.append(name)]  # type: ignore[func-returns-value]
    assert found == ["0", "1", "2", "3"]
    assert watched.working == 0  # none goes on behind the error


def test_an_error_of_what_asks_leaves_no_thread_behind() -> None:
    stream = in_order(Watched(20).jobs())
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("export")]
