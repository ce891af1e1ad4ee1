"""One thread that answers many: requests join the batch that is running, each with its own adapter where it can be."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from lora_deploy.errors import UsageError
from lora_deploy.inputs.json_files import read_json
from lora_deploy.run.generate import ROOM, OnnxModel
from lora_deploy.run.sampling import Sampling
from lora_deploy.serve.batch import Batch

__all__ = ["BusyError", "ClosedError", "Engine", "Event", "Job"]

# Tokens of prompts, padding included, that are run at once: 2,048 rows of 49,152 float32 logits are 0.4 GB.
_TOGETHER = 2048
# A token; why there are no more; or what went wrong.
Event = int | Literal["stop", "length", "cancelled"] | Exception


class BusyError(Exception):
    """More is waiting than the server takes."""


class ClosedError(BusyError):
    """The server is shutting down."""


@dataclass(eq=False)
class Job:
    """One answer that is asked for.

    Attributes:
        prompt: Its tokens.
        adapter: Name of the adapter; None for the base.
        sampling: How tokens are chosen.
        limit: How many tokens there can be, of those asked for and those that the model has positions for.
        bounded: Whether so many were asked for; else it goes on to the end of the context.
        tell: Is told every event, in the engine's thread.
        cancelled: Set by whoever does not want it any more.
        last: The token before.
        made: How many there are.
    """

    prompt: list[int]
    adapter: str | None
    sampling: Sampling
    limit: int
    bounded: bool
    tell: Callable[[Event], None]
    cancelled: threading.Event = field(default_factory=threading.Event)
    last: int = 0
    made: int = 0

    def __post_init__(self) -> None:
        self.random = np.random.default_rng(self.sampling.seed)


class Engine:
    """Answers requests with an open export, in a thread of its own.

    A pooled graph runs rows with different adapters at once. One whose adapters are inputs runs one adapter at a time:
    requests for it join while they are next in line, and the others wait until the batch has ended.

    Args:
        model: The open export; nobody else may run it meanwhile.
        max_batch: Rows that are decoded together at most.
        max_waiting: Requests that wait at most.

    Attributes:
        largest_batch: Rows that were decoded together at most, so far.
    """

    def __init__(self, model: OnnxModel, *, max_batch: int = 8, max_waiting: int = 256) -> None:
        self.model = model
        self.largest_batch = 0
        self._vocabulary = _vocabulary_of(model)
        self._max_batch, self._max_waiting = max_batch, max_waiting
        self._pooled = model.session.manifest is not None and model.session.manifest.branch == "pooled"
        self._waiting: deque[Job] = deque()
        self._wakes = threading.Condition()
        self._closed = False
        self._batch = Batch(model.session)
        self._rows: list[Job] = []
        self._inputs: Mapping[str, Any] | None = None  # None when other rows are there than before
        self._thread = threading.Thread(target=self._work, name="lora-deploy engine", daemon=True)
        self._thread.start()

    def submit(
        self,
        prompt: list[int],
        adapter: str | None,
        sampling: Sampling,
        tell: Callable[[Event], None],
        *,
        bounded: bool = True,
    ) -> Job:
        """Ask for an answer.

        Args:
            prompt: Its tokens.
            adapter: Name of the adapter; None for the base.
            sampling: How tokens are chosen, and how many at most.
            bounded: Whether so many were asked for; else the answer may end sooner, where rows that begin together
                need the context for their padding.
            tell: Is told every token, then why there are no more, or an exception; in the engine's thread.

        Raises:
            UsageError: A setting is out of range, the prompt is empty or longer than the context, or has a token that
                the model does not know.
            BusyError: Too many are waiting, or the engine has been closed (ClosedError).
        """
        sampling.check([prompt])
        unknown = [token for token in prompt if not 0 <= token < self._vocabulary]
        if unknown:
            raise UsageError(
                "the prompt has a token that the model does not know",
                found=unknown[0],
                expected=f"0 to {self._vocabulary - 1}",
            )
        limit, context = sampling.max_new_tokens, self.model.context_length
        if context is not None:
            if len(prompt) > context:
                raise UsageError(
                    "the prompt is longer than the model's context",
                    found=f"{len(prompt)} tokens",
                    expected=f"at most {context}",
                    remedy="shorten the prompt",
                )
            limit = min(limit, context - len(prompt) + 1)
        job = Job(prompt, adapter, sampling, limit, bounded, tell)
        with self._wakes:
            if self._closed:
                raise ClosedError("the server is shutting down")
            self._waiting = deque(one for one in self._waiting if not _is_cancelled(one))
            if len(self._waiting) >= self._max_waiting:
                raise BusyError(f"{len(self._waiting)} requests are waiting")
            self._waiting.append(job)
            self._wakes.notify()
        return job

    def close(self) -> None:
        """End; whoever waits is told."""
        with self._wakes:
            self._closed = True
            self._wakes.notify()
        self._thread.join()

    def _work(self) -> None:
        while True:
            with self._wakes:
                self._wakes.wait_for(lambda: self._closed or self._waiting or self._rows)
                if self._closed:
                    left = [*self._rows, *self._waiting]
                    break
            try:
                self._admit()
                self._advance()
            except Exception as error:  # whatever it is, the server answers the next request
                for job in self._rows:
                    job.tell(error)
                self._rows, self._inputs, self._batch = [], None, Batch(self.model.session)
        for job in left:
            job.tell(ClosedError("the server is shutting down"))

    def _admit(self) -> None:
        """Let those in who are next in line and can join."""
        new: list[Job] = []
        refused = None if self._rows else self._refresh()
        with self._wakes:
            while self._waiting and self._can_join(self._waiting[0], new):
                new.append(self._waiting.popleft())
        if refused is not None:
            for job in new:
                job.tell(refused)
            return
        new = [job for job in new if not _is_cancelled(job) and self._can_run(job)]
        if not new:
            return
        try:
            inputs = self._inputs_of([job.adapter for job in new])
            logits = self._batch.join([job.prompt for job in new], inputs, max(job.limit for job in new))
        except Exception as error:
            for job in new:
                job.tell(error)
            return
        self._rows, self._inputs = [*self._rows, *new], None
        self.largest_batch = max(self.largest_batch, len(self._rows))
        self._choose(logits, new)

    def _refresh(self) -> Exception | None:
        """Look for adapters that came or were replaced; what went wrong."""
        try:
            self.model.adapters.refresh()
        except Exception as error:  # a disk that is gone
            return error
        return None

    def _can_join(self, job: Job, new: list[Job]) -> bool:
        together = [*self._rows, *new]
        if not together:
            return True
        if len(together) >= self._max_batch or not self._batch.can_grow:
            return False
        rows = [*new, job]
        longest = max(len(row.prompt) for row in rows)
        if new and len(rows) * longest > _TOGETHER:
            return False
        if not self._pooled:
            if job.adapter != together[0].adapter:
                return False
            # A file that was replaced meanwhile is read when those who have the older one have ended.
            if job.adapter is not None and not self.model.adapters.is_current(job.adapter):
                return False
        return not self.model.session.writes_in_place or self._fit(rows, longest)

    def _fit(self, rows: list[Job], longest: int) -> bool:
        """Whether rows that begin together, whose padding takes positions too, have room; endless ones get less."""
        context = self.model.context_length
        if context is None:
            return True
        room = context - longest + 1
        if any(room < (row.limit if row.bounded else min(row.limit, ROOM)) for row in rows):
            return False
        for row in rows:
            row.limit = min(row.limit, room)
        return True

    def _can_run(self, job: Job) -> bool:
        """Whether its adapter can be read; it is told if not."""
        try:
            self._inputs_of([job.adapter])
        except Exception as error:  # a damaged file, or no memory for it
            job.tell(error)
            return False
        return True

    def _inputs_of(self, adapters: list[str | None]) -> Mapping[str, Any]:
        if self._pooled:
            return self.model.adapters.row_inputs(adapters)
        return self.model.adapters.inputs(adapters[0])

    def _advance(self) -> None:
        """One token more for every row."""
        self._let_go([_is_cancelled(job) for job in self._rows])
        if not self._rows:
            return
        if self._inputs is None:
            names = [job.adapter for job in self._rows]
            self._inputs = self._inputs_of(self._batch.spread(names) if self._pooled else names)
        logits = self._batch.step([job.last for job in self._rows], self._inputs)
        self._choose(logits, self._rows)

    def _choose(self, logits: NDArray[np.float32], jobs: list[Job]) -> None:
        """Take the next token of some rows, and let go of those that have ended."""
        ended = set()
        for job, row in zip(jobs, logits, strict=True):
            try:
                token = job.sampling.choose(row, job.random)
            except Exception as error:  # logits that are no numbers: of this row alone
                job.tell(error)
                ended.add(id(job))
                continue
            job.last, job.made = token, job.made + 1
            job.tell(token)
            if token in self.model.eos_token_ids or job.made >= job.limit:
                job.tell("stop" if token in self.model.eos_token_ids else "length")
                ended.add(id(job))
        self._let_go([id(job) in ended for job in self._rows])

    def _let_go(self, ended: list[bool]) -> None:
        if any(ended):
            self._batch.keep(~np.array(ended))
            self._rows = [job for job, done in zip(self._rows, ended, strict=True) if not done]
            self._inputs = None


def _is_cancelled(job: Job) -> bool:
    """Whether nobody wants it any more; whoever still waits is told that it has ended."""
    cancelled = job.cancelled.is_set()
    if cancelled:
        job.tell("cancelled")
    return cancelled


def _vocabulary_of(model: OnnxModel) -> int:
    """How many tokens the model knows."""
    config = read_json(model.directory / "config.json")
    size = config.get("vocab_size") or (config.get("text_config") or {}).get("vocab_size")
    return int(size or model.tokenizer.backend_tokenizer.get_vocab_size())
