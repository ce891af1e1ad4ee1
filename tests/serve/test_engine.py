"""Answers that are written together are those that each would have had alone."""

from __future__ import annotations

import queue
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lora_deploy.errors import AdapterError, UsageError
from lora_deploy.run import OnnxModel
from lora_deploy.run.sampling import Sampling
from lora_deploy.serve.engine import BusyError, Engine, Event, Job

PROMPTS = ["Hello", "What is a much longer prompt?", "a", "Yes or no", "Once upon a time", "1 2 3"]


@contextmanager
def running(model: OnnxModel, **options: int) -> Iterator[Engine]:
    """An engine, closed in the end."""
    engine = Engine(model, **options)
    try:
        yield engine
    finally:
        engine.close()


def greedy(limit: int) -> Sampling:
    """The most probable tokens."""
    return Sampling(limit, 0.0, 0, 1.0, None)


class Asked:
    """A request and what came of it."""

    def __init__(
        self,
        engine: Engine,
        prompt: list[int],
        adapter: str | None = None,
        limit: int = 12,
        *,
        bounded: bool = True,
        sampling: Sampling | None = None,
    ) -> None:
        self.events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        how = sampling or greedy(limit)
        self.job: Job = engine.submit(prompt, adapter, how, self.events.put, bounded=bounded)

    def result(self) -> tuple[list[int], str]:
        """All tokens, and why there are no more."""
        tokens: list[int] = []
        while True:
            event = self.events.get(timeout=60)
            if isinstance(event, Exception):
                raise event
            if isinstance(event, str):
                return tokens, event
            tokens.append(event)


def alone(model: OnnxModel, prompt: list[int], adapter: str | None, limit: int) -> list[int]:
    """What the model says by itself."""
    model.set_adapter(adapter)
    return list(model.generate_tokens(prompt, max_new_tokens=limit))


@pytest.mark.parametrize(
    ("branch", "cache", "adapters"),
    [
        ("pooled", "growing", ["a", None, "b"]),
        ("pooled", "in-place", ["a", None, "b"]),
        ("hot-swap", "growing", ["b"]),
        ("hot-swap", "growing", ["a", None, "b"]),
        ("hot-swap", "in-place", ["a", "b"]),
    ],
)
def test_the_answers_are_those_of_each_alone(
    branch: str, cache: str, adapters: list[str | None], talking_branch: Callable[..., Path]
) -> None:
    """Rows begin and end at different times: of each prompt another number of tokens is asked for."""
    model = OnnxModel(talking_branch(branch, cache))
    cases = [
        (model.encode(prompt, chat_template=False), adapters[number % len(adapters)], 3 + 5 * number)
        for number, prompt in enumerate(PROMPTS)
    ]
    expected = [alone(model, *case) for case in cases]
    assert len({tuple(tokens[:3]) for tokens in expected}) > 3
    with running(model, max_batch=4) as engine:
        first = [Asked(engine, *case) for case in cases[:2]]
        first[0].events.get(timeout=60)  # it is running when the others come
        first[0].events = _put_back(first[0].events, expected[0][0])
        rest = [Asked(engine, *case) for case in cases[2:]]
        assert [asked.result()[0] for asked in [*first, *rest]] == expected
        assert engine.largest_batch <= 4
        if branch == "pooled" and cache == "growing":
            assert engine.largest_batch == 4


def _put_back(events: queue.SimpleQueue[Event], token: int) -> queue.SimpleQueue[Event]:
    """The same events with one before them; those that come go on to the new queue."""
    whole: queue.SimpleQueue[Event] = queue.SimpleQueue()
    whole.put(token)

    def pump() -> None:
        while True:
            event = events.get()
            whole.put(event)
            if not isinstance(event, int):
                return

    threading.Thread(target=pump, daemon=True).start()
    return whole


def test_a_cancelled_answer_makes_room(talking_branch: Callable[..., Path]) -> None:
    model = OnnxModel(talking_branch("pooled"))
    prompt = model.encode("Hello", chat_template=False)
    with running(model, max_batch=1) as engine:
        endless = Asked(engine, prompt, "a", 100)
        endless.events.get(timeout=60)
        endless.job.cancelled.set()
        assert len(Asked(engine, prompt, "b", 4).result()[0]) <= 4
        assert endless.result()[1] == "cancelled"
    assert endless.job.made < 100


def test_an_answer_ends_with_the_context(talking_branch: Callable[..., Path]) -> None:
    model = OnnxModel(talking_branch("pooled"))
    model.eos_token_ids = set()
    assert model.context_length == 128
    with running(model) as engine:
        tokens, reason = Asked(engine, [5] * 120, "a", 50).result()
        assert (len(tokens), reason) == (9, "length")
        with pytest.raises(UsageError, match="longer than the model's context"):
            Asked(engine, [5] * 129)
        with pytest.raises(UsageError, match="cannot be generated"):
            Asked(engine, [])


def test_too_many_are_refused_and_all_are_told_of_the_end(talking_branch: Callable[..., Path]) -> None:
    model = OnnxModel(talking_branch("pooled"))
    model.eos_token_ids = set()
    with running(model, max_batch=1, max_waiting=1) as engine:
        running_one = Asked(engine, [5, 6], None, 100)
        running_one.events.get(timeout=60)
        waiting = Asked(engine, [5, 6], None, 100)
        with pytest.raises(BusyError):
            Asked(engine, [5, 6])
    for asked in (running_one, waiting):
        with pytest.raises(BusyError, match="shutting down"):
            asked.result()
    with pytest.raises(BusyError):
        Asked(engine, [5, 6])


def test_a_damaged_adapter_fails_its_own_request_alone(talking_branch: Callable[..., Path], tmp_path: Path) -> None:
    place = Path(shutil.copytree(talking_branch("hot-swap"), tmp_path / "served"))
    model = OnnxModel(place)
    prompt = model.encode("Hello", chat_template=False)
    expected = alone(model, prompt, "b", 5)
    (place / "adapters" / "a.onnx_adapter").write_bytes(b"nothing")
    with running(OnnxModel(place)) as engine:
        broken, sound = Asked(engine, prompt, "a", 5), Asked(engine, prompt, "b", 5)
        with pytest.raises(AdapterError):
            broken.result()
        assert sound.result()[0] == expected


def test_an_adapter_that_is_replaced_while_it_runs(talking_branch: Callable[..., Path], tmp_path: Path) -> None:
    place = Path(shutil.copytree(talking_branch("hot-swap"), tmp_path / "served"))
    model = OnnxModel(place)
    prompt = model.encode("Hello", chat_template=False)
    as_a, as_b = alone(model, prompt, "a", 8), alone(model, prompt, "b", 8)
    assert as_a != as_b
    with running(OnnxModel(place)) as engine:
        assert Asked(engine, prompt, "a", 8).result()[0] == as_a
        shutil.copy(place / "adapters" / "b.onnx_adapter", place / "adapters" / ".new")
        (place / "adapters" / ".new").replace(place / "adapters" / "a.onnx_adapter")
        shutil.copy(place / "adapters" / "b.onnx_adapter", place / "adapters" / "c.onnx_adapter")
        assert Asked(engine, prompt, "a", 8).result()[0] == as_b
        assert Asked(engine, prompt, "c", 8).result()[0] == as_b


def test_a_replaced_adapter_is_read_though_others_use_the_older_one(
    talking_branch: Callable[..., Path], tmp_path: Path
) -> None:
    place = Path(shutil.copytree(talking_branch("hot-swap"), tmp_path / "served"))
    model = OnnxModel(place)
    prompt = model.encode("Hello", chat_template=False)
    as_b = alone(model, prompt, "b", 8)
    busy = OnnxModel(place)
    busy.eos_token_ids = set()
    slow_down(busy)
    with running(busy) as engine:
        long = Asked(engine, prompt, "a", 60)
        long.events.get(timeout=60)
        shutil.copy(place / "adapters" / "b.onnx_adapter", place / "adapters" / ".new")
        (place / "adapters" / ".new").replace(place / "adapters" / "a.onnx_adapter")
        new = Asked(engine, prompt, "a", len(as_b))
        assert new.result()[0] == as_b
        assert len(long.result()[0]) == 59


def slow_down(model: OnnxModel) -> None:
    """A step takes a fiftieth of a second."""
    quick = model.session.forward

    def forward(*given: Any) -> Any:
        time.sleep(0.02)
        return quick(*given)

    model.session.forward = forward  # type: ignore[method-assign]


@pytest.mark.parametrize("where", ["inputs", "refresh"])
def test_an_error_that_is_not_ours_is_told_and_the_next_is_answered(
    where: str, talking_branch: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = OnnxModel(talking_branch("hot-swap"))
    prompt = model.encode("Hello", chat_template=False)
    expected = alone(model, prompt, "a", 5)

    def fail(*_: Any) -> Any:
        raise RuntimeError("no memory")

    with running(model) as engine:
        with monkeypatch.context() as broken:
            broken.setattr(model.adapters, where, fail)
            with pytest.raises(RuntimeError, match="no memory"):
                Asked(engine, prompt, "a", 5).result()
        assert Asked(engine, prompt, "a", 5).result()[0] == expected


class Failing(Sampling):
    """Chooses one token, and fails at the next."""

    def choose(self, logits: Any, random: Any) -> int:
        """Fails where a token was drawn before."""
        if random.random() and random.bit_generator.state["state"]["state"] != self._first(random):
            raise FloatingPointError("logits are no numbers")
        return int(logits.argmax())

    def _first(self, random: Any) -> int:
        again = np.random.default_rng(self.seed)
        again.random()
        return int(again.bit_generator.state["state"]["state"])


def test_a_row_that_fails_fails_alone(talking_branch: Callable[..., Path]) -> None:
    model = OnnxModel(talking_branch("pooled"))
    prompt = model.encode("Hello", chat_template=False)
    expected = alone(model, prompt, "a", 30)
    slow_down(model)
    with running(model) as engine:
        sound = Asked(engine, prompt, "a", 30)
        broken = Asked(engine, prompt, "b", 30, sampling=Failing(30, 1.0, 0, 1.0, 3))
        with pytest.raises(FloatingPointError):
            broken.result()
        assert sound.result()[0] == expected


@pytest.mark.parametrize("token", [-5, 260, 2**70])
def test_a_token_that_the_model_does_not_know(token: int, talking_branch: Callable[..., Path]) -> None:
    with running(OnnxModel(talking_branch("pooled"))) as engine, pytest.raises(UsageError, match="does not know"):
        Asked(engine, [5, token])


@pytest.mark.parametrize("cache", ["growing", "in-place"])
def test_a_long_prompt_is_run_in_slices_and_by_itself(
    cache: str, talking_branch: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lora_deploy.serve.batch.SLICE", 16)
    monkeypatch.setattr("lora_deploy.serve.engine._TOGETHER", 60)
    model = OnnxModel(talking_branch("pooled", cache))
    prompts = [[5 + (7 * place) % 200 for place in range(length)] for length in (100, 3, 20)]
    expected = [alone(model, prompt, "a", 6) for prompt in prompts]
    widths = []
    quick = model.session.forward

    def forward(ids: Any, *given: Any) -> Any:
        widths.append(ids.shape)
        return quick(ids, *given)

    model.session.forward = forward  # type: ignore[method-assign]
    with running(model) as engine:
        asked = [Asked(engine, prompt, "a", 6) for prompt in prompts]
        assert [one.result()[0] for one in asked] == expected
    assert max(rows * width for rows, width in widths) <= 60
    assert (1, 16) in widths


def test_answers_without_a_limit_share_a_graph_that_writes_in_place(talking_branch: Callable[..., Path]) -> None:
    model = OnnxModel(talking_branch("pooled", "in-place"))
    model.eos_token_ids = set()
    slow_down(model)
    with running(model) as engine:
        first = Asked(engine, [5], None, 4)
        rest = [Asked(engine, [5] * length, "a", 1 << 30, bounded=False) for length in (1, 4, 9)]
        first.result()
        lengths = [len(one.result()[0]) for one in rest]
    assert engine.largest_batch >= 2
    assert all(length <= 128 for length in lengths)


def test_those_who_have_gone_leave_the_queue(talking_branch: Callable[..., Path]) -> None:
    model = OnnxModel(talking_branch("pooled"))
    model.eos_token_ids = set()
    slow_down(model)
    with running(model, max_batch=1, max_waiting=1) as engine:
        first = Asked(engine, [5], None, 100)
        first.events.get(timeout=60)
        gone = Asked(engine, [5], None, 100)
        gone.job.cancelled.set()
        waiting = Asked(engine, [6], None, 1)
        assert gone.result() == ([], "cancelled")
        first.job.cancelled.set()
        assert len(waiting.result()[0]) == 1
