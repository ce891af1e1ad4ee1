"""onnxruntime-genai; merged and hot-swap exports of SmolLM2 are in tests/real, which asks for the same tokens.

Its `set_model_input` does nothing for an optional input (0.18); an adapter's file reaches every one.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from tests.clients.conftest import NEW_TOKENS, POOL, Answers, Prompts
from tests.clients.test_onnxruntime import up_to_end


def write_choice(file: Path, ids: Sequence[int]) -> Path:
    """An adapter that is nothing but the choice of one in a pool, for each row or for all."""
    value = onnxruntime.OrtValue.ortvalue_from_numpy(np.array(ids, np.int64))
    written = onnxruntime.AdapterFormat()
    written.set_adapter_version(1)
    written.set_model_version(1)
    written.set_parameters({"adapter_ids": value})
    written.export_adapter(str(file))
    return file


def decode(directory: Path, rows: list[list[int]], adapter: Path | None) -> list[list[int]]:
    """The greedy answers to prompts of one length, in one batch."""
    genai = pytest.importorskip("onnxruntime_genai", reason="needs pip install onnxruntime-genai")
    model = genai.Model(str(directory))
    adapters = genai.Adapters(model)
    parameters = genai.GeneratorParams(model)
    options = {"max_length": len(rows[0]) + NEW_TOKENS, "batch_size": len(rows), "do_sample": False}
    parameters.set_search_options(**options)
    generator = genai.Generator(model, parameters)
    if adapter is not None:
        adapters.load(str(adapter), "one")
        generator.set_active_adapter(adapters, "one")
    generator.append_tokens(np.array(rows, np.int32))
    steps = []
    while not generator.is_done():
        generator.generate_next_token()
        steps.append(generator.get_next_tokens())  # with the end token, which its sequences leave out
    return np.stack(steps, 1).tolist()  # type: ignore[no-any-return]


def test_an_adapter_of_a_pool_is_chosen_by_a_file(
    exports: dict[str, Path], prompts: Prompts, ours: Answers, tmp_path: Path
) -> None:
    files = {name: write_choice(tmp_path / f"{name}.onnx_adapter", [place]) for place, name in enumerate(POOL)}
    for name, expected in ours["pooled"].items():
        found = [decode(exports["pooled"], [ids], files[name] if name else None) for ids in prompts.ids]
        assert [up_to_end(row, prompts.ends) for (row,) in found] == expected


def test_rows_of_a_pool_have_adapters_of_their_own(
    exports: dict[str, Path], prompts: Prompts, ours: Answers, tmp_path: Path
) -> None:
    rows = ("b", None, "a")
    file = write_choice(tmp_path / "rows.onnx_adapter", [1, -1, 0])
    for number, ids in enumerate(prompts.ids):
        found = [up_to_end(row, prompts.ends) for row in decode(exports["pooled"], [ids] * 3, file)]
        assert found == [ours["pooled"][name][number] for name in rows]
