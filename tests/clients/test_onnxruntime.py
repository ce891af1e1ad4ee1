"""Nothing but onnxruntime and numpy: what any program in any language has to do."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray

from tests.clients.conftest import NEW_TOKENS, POOL, Answers, Prompts


def open_session(directory: Path) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # or it warns of every optional input
    return onnxruntime.InferenceSession(directory / "model.onnx", options)


def decode(
    session: Any,
    prompts: Prompts,
    number: int,
    *,
    rows: int = 1,
    more: Mapping[str, Any] | None = None,
    options: Any = None,
) -> list[list[int]]:
    """The greedy answer to a prompt, in each of several rows."""
    prompt = prompts.ids[number]
    inputs, outputs = session.get_inputs(), [node.name for node in session.get_outputs()]
    past = [node for node in inputs if node.name.startswith("past_key_values.")]
    cache = {node.name: np.zeros((rows, node.shape[1], 0, node.shape[3]), np.float32) for node in past}
    new = np.array([prompt] * rows)
    answer = np.zeros((rows, 0), np.int64)
    for length in range(len(prompt), len(prompt) + NEW_TOKENS):
        feeds = {"input_ids": new, "attention_mask": np.ones((rows, length), np.int64)}
        feeds["position_ids"] = np.arange(length - new.shape[1], length)[None].repeat(rows, 0)
        found = dict(zip(outputs, session.run(outputs, {**feeds, **cache, **(more or {})}, options), strict=True))
        new = found["logits"][:, -1:].argmax(-1)
        answer = np.concatenate([answer, new], 1)
        cache = {name: found[name.replace("past_key_values", "present")] for name in cache}
    return [up_to_end(row, prompts.ends) for row in answer.tolist()]


def up_to_end(tokens: list[int], ends: set[int]) -> list[int]:
    """The tokens up to and including the first that ends an answer."""
    return tokens[: next((place + 1 for place, token in enumerate(tokens) if token in ends), len(tokens))]


def read_tensors(file: str | Path) -> dict[str, NDArray[Any]]:
    """A and B of every slot, copied: what onnxruntime gives is the memory of the adapter, and goes with it."""
    adapter = onnxruntime.AdapterFormat.read_adapter(str(file))
    return {name: value.numpy().copy() for name, value in adapter.get_parameters().items()}


def test_a_merged_export_is_a_plain_model(exports: dict[str, Path], prompts: Prompts, ours: Answers) -> None:
    session = open_session(exports["merge"])
    assert [decode(session, prompts, n)[0] for n in range(3)] == ours["merge"]["a"]


@pytest.mark.parametrize("way", ["active adapter", "inputs"])
def test_adapters_are_swapped_between_runs(way: str, exports: dict[str, Path], prompts: Prompts, ours: Answers) -> None:
    session = open_session(exports["hot-swap"])
    for name in (None, "a", "b", None):
        given: dict[str, Any] = {}
        file = str(exports["hot-swap"] / "adapters" / f"{name}.onnx_adapter")
        if name is not None and way == "inputs":
            given["more"] = read_tensors(file)
        elif name is not None:
            adapter = onnxruntime.LoraAdapter()
            adapter.Load(file)
            given["options"] = onnxruntime.RunOptions()
            given["options"].add_active_adapter(adapter)
        assert [decode(session, prompts, n, **given)[0] for n in range(3)] == ours["hot-swap"][name]


def test_rows_of_a_pooled_export_have_adapters_of_their_own(
    exports: dict[str, Path], prompts: Prompts, ours: Answers
) -> None:
    session = open_session(exports["pooled"])
    rows = ("b", None, "a")
    ids = np.array([-1 if name is None else POOL.index(name) for name in rows])
    for number in range(3):
        found = decode(session, prompts, number, rows=3, more={"adapter_ids": ids})
        assert found == [ours["pooled"][name][number] for name in rows]
        assert decode(session, prompts, number) == [ours["pooled"][None][number]]
