"""Parts of a data file that are made beside one another and come out in order.

Reading, dequantizing, merging and rounding one weight keeps one core busy; the next ones keep the others busy while the
first is written. What is made is the same for any number of threads, and so is the error that is raised: the one of the
first part that has one.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch

from lora_deploy.run.threads import usable_threads

__all__ = ["Job", "Parts", "in_order"]

# Name of an initializer and its values, or some of its rows: those of the same name come one after the other.
Parts = list[tuple[str, torch.Tensor]]

_THREADS = 4
_BOUND = 1 << 27  # values in the making: two of the largest weights of an 8B model


def _as_made(parts: Parts) -> Iterable[tuple[str, torch.Tensor]]:
    return parts


@dataclass(frozen=True)
class Job:
    """Something to make.

    Attributes:
        values: How many numbers are in memory for it.
        make: Makes it, in a thread of its own, in any order.
        finish: What comes out of it, in the caller's thread, in the order of the jobs.
    """

    values: int
    make: Callable[[], Parts]
    finish: Callable[[Parts], Iterable[tuple[str, torch.Tensor]]] = _as_made


def in_order(jobs: Iterable[Job]) -> Iterator[tuple[str, torch.Tensor]]:
    """Run jobs beside one another, as many as there are cores and memory is bounded for.

    Args:
        jobs: Are asked for one at a time, just before they begin.

    Yields:
        What they make, in their order.

    Raises:
        Exception: That of the first job that fails, when those before it have come out.
    """
    threads = max(1, min(_THREADS, _cores()))
    own = torch.get_num_threads()
    executor = ThreadPoolExecutor(threads, "export", initializer=torch.set_num_threads, initargs=(1,))
    begun: deque[tuple[Job, Future[Parts]]] = deque()
    waiting, source = None, iter(jobs)
    try:
        while True:
            waiting = waiting or next(source, None)
            room = len(begun) <= threads and (
                waiting is None or sum(job.values for job, _ in begun) + waiting.values <= _BOUND
            )
            if waiting is not None and (room or not begun):
                begun.append((waiting, executor.submit(waiting.make)))
                waiting = None
            elif begun:
                job, future = begun[0]
                yield from job.finish(future.result())
                begun.popleft()
                del job, future  # and what was made
            else:
                return
    finally:
        executor.shutdown(cancel_futures=True)
        torch.set_num_threads(own)  # threads to come ask for what was set last


def _cores() -> int:
    return usable_threads() or os.cpu_count() or 1
