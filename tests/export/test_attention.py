"""Attention with the cache in place: the same function for every padding, and where it is not taken."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from transformers import AutoModelForCausalLM

from lora_deploy.errors import UsageError
from lora_deploy.export import export_onnx
from lora_deploy.inputs.json_files import read_json
from lora_deploy.run import OnnxSession
from tests.conftest import TINY_FAMILIES, VOCABULARY, CheckpointFactory, tiny_model

TOLERANCE = 1e-4
# Rows of 7 slots: whole, padded left, right, on both sides.
MASK = np.array([[1] * 7, [0, 0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 0, 0, 0]])


def _export(base: Path, output: Path, **options: Any) -> Path:
    return export_onnx(base, output=output, quantization="none", verify=False, **options).output


@pytest.fixture(scope="module")
def exported(checkpoint_dir: CheckpointFactory, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`exported(family)`: (base, export)."""
    made: dict[str, tuple[Path, Path]] = {}

    def make(family: str) -> tuple[Path, Path]:
        if family not in made:
            base = checkpoint_dir(family, **({"n_embd": 64} if family == "gpt2" else {}))
            made[family] = base, _export(base, tmp_path_factory.mktemp("attention") / family, cache="in-place")
        return made[family]

    return make


def _operators(directory: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(directory / "model.onnx", load_external_data=False).graph.node)


def _expected(base: Path, tokens: list[int]) -> torch.Tensor:
    """The logits after the last of a row's own tokens, without padding."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0]  # type: ignore[no-any-return]


def _ids(rows: int, new: int, seed: int = 0) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.random.default_rng(seed).integers(3, VOCABULARY, (rows, new))


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_it_is_taken_on_a_cpu_and_reads_one_product_where_nothing_is_added_to_it(family: str, exported: Any) -> None:
    _, directory = exported(family)
    operators = _operators(directory)
    assert operators["GroupQueryAttention"] == 2
    assert not {"Attention", "RotaryEmbedding"} & operators.keys()
    # llama: gate and up only. The biases of qwen2 and gpt2 are added to q, k and v apart.
    assert operators["Split"] == {"llama": 2, "qwen2": 4, "gpt2": 2}[family]
    assert read_json(directory / "genai_config.json")["search"]["past_present_share_buffer"] is True
    # onnxruntime warns of each initializer that no node reads.
    graph = onnx.load(directory / "model.onnx", load_external_data=False).graph
    assert {tensor.name for tensor in graph.initializer} <= {name for node in graph.node for name in node.input}


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_every_padding_of_a_prompt_and_the_tokens_after_it_is_the_unpadded_row(family: str, exported: Any) -> None:
    base, directory = exported(family)
    session = OnnxSession(directory)
    ids, seen = _ids(4, 9), np.concatenate([MASK, np.ones((4, 2), int)], axis=1)
    cache, found = None, []
    for start, stop in ((0, 7), (7, 8), (8, 9)):
        logits, cache = session.forward(ids[:, start:stop], seen[:, :stop], cache)
        found.append(logits)
    for row, logits in enumerate(np.concatenate(found, axis=1)):
        expected = _expected(base, ids[row][seen[row] == 1].tolist())
        assert expected.abs().max() > 100 * TOLERANCE
        torch.testing.assert_close(torch.from_numpy(logits[seen[row] == 1]), expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("family", TINY_FAMILIES)
@pytest.mark.parametrize("row", [0, 1, 2])
def test_a_prompt_in_pieces_is_the_whole_prompt(family: str, row: int, exported: Any) -> None:
    base, directory = exported(family)
    session = OnnxSession(directory)
    ids, seen = _ids(1, 12), np.concatenate([MASK[row : row + 1], np.ones((1, 5), int)], axis=1)
    cache, found = None, []
    for start, stop in ((0, 7), (7, 11), (11, 12)):
        logits, cache = session.forward(ids[:, start:stop], seen[:, :stop], cache)
        found.append(logits)
    logits = np.concatenate(found, axis=1)[0][seen[0] == 1]
    expected = _expected(base, ids[0][seen[0] == 1].tolist())
    torch.testing.assert_close(torch.from_numpy(logits), expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_a_cache_with_room_is_written_in_place_until_it_is_full(family: str, exported: Any) -> None:
    _, directory = exported(family)
    session = OnnxSession(directory)
    assert session.writes_in_place
    ids, seen = _ids(4, 11), np.concatenate([MASK, np.ones((4, 4), int)], axis=1)
    room = session.empty_cache(4, room=9)
    plain, roomy = None, room
    for start, stop in ((0, 7), (7, 8), (8, 9), (9, 10), (10, 11)):
        expected, plain = session.forward(ids[:, start:stop], seen[:, :stop], plain)
        logits, roomy = session.forward(ids[:, start:stop], seen[:, :stop], roomy)
        real = seen[:, start:stop] == 1
        np.testing.assert_allclose(logits[real], expected[real], atol=1e-5)
        assert (roomy is room) == (stop <= 9)
        for name, value in plain.items():
            held = roomy[name].numpy()
            assert held.shape[2] == max(stop, 9)
            np.testing.assert_allclose(held[:, :, :stop], value.numpy(), atol=1e-5)
            assert not held[:, :, stop:].any()


def test_positions_that_the_kernel_would_not_read_give_nan_for_their_row_and_not_a_wrong_answer(exported: Any) -> None:
    _, directory = exported("llama")
    session = onnxruntime.InferenceSession(directory / "model.onnx", providers=["CPUExecutionProvider"])
    ids, mask = _ids(3, 5), np.array([[1] * 5, [0, 0, 1, 1, 1], [1] * 5])
    feeds = {"input_ids": ids, "attention_mask": mask}
    feeds |= {
        f"past_key_values.{layer}.{kind}": np.zeros((3, 2, 0, 16), np.float32)
        for layer in range(2)
        for kind in ("key", "value")
    }
    # The second is padding as transformers' generate numbers it; the third starts again in the middle.
    positions = np.array([[0, 1, 2, 3, 4], [1, 1, 0, 1, 2], [0, 1, 2, 0, 1]])
    logits = session.run(["logits"], feeds | {"position_ids": positions})[0]
    assert np.isfinite(logits[:2]).all()
    assert np.isnan(logits[2]).all()
    right = session.run(["logits"], feeds | {"position_ids": np.maximum(np.cumsum(mask, axis=1) - 1, 0)})[0]
    np.testing.assert_array_equal(logits[:2], right[:2])


@pytest.mark.parametrize(
    ("fields", "options", "in_place"),
    [
        ({}, {"precision": "int4"}, True),
        ({}, {"precision": "int8"}, True),
        ({}, {"precision": "int4", "cache": "growing"}, False),
        ({}, {"precision": "int4", "compute_dtype": "fp16"}, False),
        ({}, {"precision": "int4", "provider": "webgpu"}, False),
        ({"head_dim": 24}, {"precision": "int4"}, False),
        ({}, {}, False),
        ({}, {"merge": False}, False),
        ({}, {"merge": False, "cache": "in-place"}, True),
    ],
    ids=str,
)
def test_where_it_is_the_default(
    fields: dict[str, int],
    options: dict[str, Any],
    in_place: bool,
    checkpoint_dir: CheckpointFactory,
    tmp_path: Path,
) -> None:
    directory = _export(checkpoint_dir("llama", **fields), tmp_path / "out", **options)
    operators = _operators(directory)
    assert operators["GroupQueryAttention"] == 2 * in_place
    assert operators["Attention"] == 2 * (not in_place)
    assert read_json(directory / "genai_config.json")["search"]["past_present_share_buffer"] is in_place
    assert OnnxSession(directory).writes_in_place is in_place


@pytest.mark.parametrize(
    ("fields", "options", "message"),
    [
        ({}, {"cache": "shared"}, "no such cache"),
        ({}, {"cache": "in-place", "provider": "cuda", "precision": "fp32"}, "on a CPU, in fp32"),
        ({}, {"cache": "in-place", "precision": "fp16"}, "on a CPU, in fp32"),
        ({"head_dim": 24}, {"cache": "in-place"}, "no kernel that writes this model's cache in place"),
    ],
    ids=str,
)
def test_where_it_cannot_be_it_is_refused_before_anything_is_written(
    fields: dict[str, int],
    options: dict[str, Any],
    message: str,
    checkpoint_dir: CheckpointFactory,
    tmp_path: Path,
) -> None:
    with pytest.raises(UsageError, match=message):
        _export(checkpoint_dir("llama", **fields), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_pass_that_counts_lengths_from_the_mask_would_fail_here(exported: Any, tmp_path: Path) -> None:
    """The control: what other exporters write, on the same rows."""
    base, directory = exported("llama")
    model = onnx.load(directory / "model.onnx")
    for node in model.graph.node:
        if node.op_type == "GroupQueryAttention":
            node.input[5] = "counted"
            del node.input[9:]
    one = onnx.helper.make_tensor("one64", onnx.TensorProto.INT64, [1], [1])
    model.graph.initializer.append(one)
    sums = onnx.helper.make_node("ReduceSum", ["attention_mask", "one64"], ["summed"], keepdims=0)
    less = onnx.helper.make_node("Sub", ["summed", "one64"], ["less"])
    cast = onnx.helper.make_node("Cast", ["less"], ["counted"], to=onnx.TensorProto.INT32)
    for node in (cast, less, sums):
        model.graph.node.insert(0, node)
    onnx.save(model, tmp_path / "model.onnx")
    for file in directory.iterdir():
        if file.is_file() and file.name != "model.onnx":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    ids = _ids(4, 7)
    found, _ = OnnxSession(tmp_path).forward(ids, MASK)
    for row, works in ((0, True), (1, False), (2, True), (3, False)):
        own = MASK[row] == 1
        error = (torch.from_numpy(found[row][own]) - _expected(base, ids[row][own].tolist())).abs().max()
        assert (error < TOLERANCE) == works


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_genai_gives_the_same_tokens_for_rows_of_different_lengths(family: str, exported: Any) -> None:
    """It pads on the right, and writes into one buffer."""
    genai = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")
    _, directory = exported(family)
    rows = [_ids(1, length, seed=length)[0].tolist() for length in (9, 4)]
    model = genai.Model(str(directory))
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=20, min_length=20, batch_size=2, do_sample=False)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(np.array([rows[0], rows[1] + [0] * 5], dtype=np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    twin = tiny_model(family)
    for number, row in enumerate(rows):
        expected = twin.generate(torch.tensor([row]), max_new_tokens=11, min_new_tokens=11, do_sample=False)
        assert list(generator.get_sequence(number))[9:] == expected[0, len(row) :].tolist()
