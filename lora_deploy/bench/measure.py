"""What one process measures of an export, on prompts of random tokens."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from itertools import cycle, islice, repeat
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from lora_deploy.bench.machine import peak_memory, resident_memory
from lora_deploy.bench.options import BenchOptions
from lora_deploy.errors import UsageError
from lora_deploy.inputs.json_files import read_json
from lora_deploy.run.adapters import Adapters
from lora_deploy.run.classify import exported_task
from lora_deploy.run.session import Cache, OnnxSession, import_onnxruntime
from lora_deploy.task import is_classification

__all__ = ["Burst", "Sample", "measure"]

_MOST_ADAPTERS, _BATCH, _SWITCHES = 8, 8, 200
Ids = NDArray[np.int64]


class Burst(BaseModel):
    """Seconds that something took, and the tokens or texts that came of it; None where it is of neither."""

    seconds: float
    count: int | None = None


class Sample(BaseModel):
    """What one process found.

    Attributes:
        task: What the export is for.
        branch: As `Manifest` has it.
        precision: As `Manifest` has it; None where there is no manifest.
        adapters: Those it ran with.
        prompt_tokens: Tokens of the prompt.
        tokens: Tokens of a burst; 0 of a classifier.
        bursts: By name.
        memory: "peak_memory", and "added_memory", which is less what the process had before it opened the export, in
            bytes. Empty where the system does not say.
    """

    task: str
    branch: str | None
    precision: str | None
    adapters: list[str]
    prompt_tokens: int
    tokens: int
    bursts: dict[str, Burst]
    memory: dict[str, int]


class _Chosen(NamedTuple):
    """Names of the adapters to run with, and what a run is given for the first."""

    names: list[str]
    inputs: Mapping[str, Any]


def measure(options: BenchOptions) -> Sample:
    """Open an export and measure everything once. Memory is this process's, so each sample wants one of its own.

    Args:
        options: `runs` is not read.

    Raises:
        CheckpointError: There is no export, or it cannot run.
        AdapterError: An adapter cannot be read or is not one for the export.
        UsageError: The options do not go with the export, the machine or each other.
    """
    task = exported_task(options.directory)
    if task not in ("causal-lm", "sequence-classification", "token-classification"):
        raise UsageError("only language models and classifiers can be measured", found=task, file=options.directory)
    import_onnxruntime()
    if options.weights == "native":
        from lora_deploy.native import load_kernels

        load_kernels()  # compiled once and for all
    before = resident_memory()
    start = time.perf_counter()
    session = OnnxSession(options.directory, options.provider, options.weights, threads=options.threads)
    bursts = {"open": Burst(seconds=time.perf_counter() - start)}
    branch = session.manifest.branch if session.manifest is not None else None
    adapters = Adapters(session, options.directory)
    start = time.perf_counter()
    chosen = _choose(adapters, options.adapters)
    swaps = branch == "hot-swap" and bool(chosen.names)
    if swaps:
        bursts["adapter_load"] = Burst(seconds=time.perf_counter() - start)
    classifies = is_classification(task)
    prompt, tokens = options.lengths(session.context_length, decodes=not classifies)
    ids = _random_ids(options.directory, prompt)
    if classifies:
        bursts |= _classify(session, ids, chosen.inputs)
    else:
        bursts |= _generate(session, ids, tokens, chosen.inputs)
    memory = _memory_since(before)  # what follows compares, and is nothing that a server would do
    if swaps and not classifies:
        bursts |= _switch(session, adapters, ids, tokens, chosen.names)
    if branch == "pooled" and not classifies:
        bursts |= _mix(session, adapters, ids, tokens, chosen.names)
    return Sample(
        task=task,
        branch=branch,
        precision=session.manifest.precision if session.manifest is not None else None,
        adapters=chosen.names,
        prompt_tokens=prompt,
        tokens=tokens,
        bursts=bursts,
        memory=memory,
    )


def _memory_since(before: int | None) -> dict[str, int]:
    peak = peak_memory()
    return {} if peak is None or before is None else {"peak_memory": peak, "added_memory": max(peak - before, 0)}


def _choose(adapters: Adapters, asked: tuple[str, ...]) -> _Chosen:
    names = list(asked) or adapters.names[:_MOST_ADAPTERS]
    return _Chosen(names, adapters.inputs(names[0] if names else None))


def _random_ids(directory: Path, length: int) -> Ids:
    """(1, length)."""
    file = directory / "config.json"
    found = read_json(file).get("vocab_size") if file.is_file() else None
    vocabulary = found if type(found) is int and found > 0 else 1
    return np.random.default_rng(0).integers(0, vocabulary, (1, length))


def _timed(action: Callable[[], Any]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def _prefill(session: OnnxSession, ids: Ids, tokens: int, inputs: Mapping[str, Any]) -> tuple[float, Ids, Cache]:
    """Seconds, the next token of each row (batch, 1), and a cache with room for a burst."""
    cache = session.empty_cache(len(ids), ids.shape[1] + tokens + 1)
    start = time.perf_counter()
    logits, cache = session.forward(ids, np.ones_like(ids), cache, inputs)
    chosen = logits[:, -1].argmax(axis=-1)[:, None]
    return time.perf_counter() - start, chosen, cache


def _decode(session: OnnxSession, ids: Ids, tokens: int, inputs: Iterator[Mapping[str, Any]]) -> tuple[float, float]:
    """Seconds of the prompt, and of so many tokens after it, of every row; each run takes the next of the inputs.

    The first step after a prompt wakes threads and caches, and is in neither.
    """
    prompt_seconds, chosen, cache = _prefill(session, ids, tokens, next(inputs))
    batch, past = ids.shape
    mask = np.ones((batch, past + tokens + 1), np.int64)
    start = 0.0
    for step in range(tokens + 1):
        if step == 1:
            start = time.perf_counter()
        logits, cache = session.forward(chosen, mask[:, : past + step + 1], cache, next(inputs))
        chosen = logits[:, -1].argmax(axis=-1)[:, None]
    return prompt_seconds, time.perf_counter() - start


def _generate(session: OnnxSession, ids: Ids, tokens: int, inputs: Mapping[str, Any]) -> dict[str, Burst]:
    """The very first token of a session, and prompt and tokens when it is warm."""
    first, _, _ = _prefill(session, ids, tokens, inputs)
    prompt, decoded = _decode(session, ids, tokens, repeat(inputs))
    return {
        "first_token": Burst(seconds=first, count=ids.shape[1]),
        "prefill": Burst(seconds=prompt, count=ids.shape[1]),
        "decode": Burst(seconds=decoded, count=tokens),
    }


def _switch(session: OnnxSession, adapters: Adapters, ids: Ids, tokens: int, names: list[str]) -> dict[str, Burst]:
    """Without adapter, and from one adapter to the next; to none and back where there is one only."""
    turns: list[str | None] = [*names] if len(names) > 1 else [None, *names]
    for name in turns:
        adapters.inputs(name)  # each is read on first use, which is not what is measured here
    switching = _timed(lambda: [adapters.inputs(name) for name in islice(cycle(turns), _SWITCHES)])
    _, bare = _decode(session, ids, tokens, repeat({}))
    _, switched = _decode(session, ids, tokens, map(adapters.inputs, cycle(turns)))
    return {
        "decode_bare": Burst(seconds=bare, count=tokens),
        "decode_switching": Burst(seconds=switched, count=tokens),
        "adapter_switch": Burst(seconds=switching / _SWITCHES),
    }


def _mix(session: OnnxSession, adapters: Adapters, ids: Ids, tokens: int, names: list[str]) -> dict[str, Burst]:
    """A row for each adapter, in one run and one after the other."""
    _, pooled = _decode(session, ids.repeat(len(names), axis=0), tokens, repeat(adapters.row_inputs(names)))
    singly = sum(_decode(session, ids, tokens, repeat(adapters.inputs(name)))[1] for name in names)
    count = len(names) * tokens
    return {"pooled": Burst(seconds=pooled, count=count), "singly": Burst(seconds=singly, count=count)}


def _classify(session: OnnxSession, ids: Ids, inputs: Mapping[str, Any]) -> dict[str, Burst]:
    """The very first text of a session; then texts one by one, and as many in a batch."""

    def run(batch: Ids) -> None:
        session.forward(batch, np.ones_like(batch), adapter=inputs)

    first = _timed(lambda: run(ids))
    batch = ids.repeat(_BATCH, axis=0)
    run(batch)  # once more for the first time: the memory that it takes is kept
    return {
        "first_text": Burst(seconds=first, count=1),
        "texts": Burst(seconds=sum(_timed(lambda: run(ids)) for _ in range(_BATCH)), count=_BATCH),
        "texts_in_batch": Burst(seconds=_timed(lambda: run(batch)), count=_BATCH),
    }
