"""Sizes at the edges: tiny weights, resized tables, empty caches, full contexts, and graphs of very many parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import pytest
import torch

from lora_deploy.adapter import load_adapter, write_adapter
from lora_deploy.errors import AdapterError, OutputError, ParityError, UsageError
from lora_deploy.export import export_onnx, writer
from lora_deploy.quantization import QuantizationScheme
from lora_deploy.quantization.base import TrainingBase
from lora_deploy.run import OnnxSession
from lora_deploy.verify.reference import compute_logits, load_twin
from tests.commands import tree
from tests.conftest import random_adapter, save_tiny, tiny_model, token_ids
from tests.export.conftest import SHORT, BranchFactory, ExportFactory
from tests.export.edges import assert_proven, export_edge

FP16: dict[str, Any] = {"merge": True, "precision": "fp16"}
TOLERANCE = 1e-4


def _scale(**factors: float) -> Any:
    """Multiply the weights of layers of these names, in both layers of the model."""

    def damage(tensors: dict[str, torch.Tensor]) -> None:
        for name, values in tensors.items():
            values *= factors.get(name.split(".")[-2], 1.0)

    return damage


def test_subnormal_weights_in_float16_that_hardly_count(tmp_path: Path) -> None:
    """Of 1e-6, beside a largest of 1e-5: float16 has steps of 6e-8 there."""
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    result = export_edge(tmp_path, "none", mode=FP16, damage=_scale(up_proj=5e-6), target_modules=targets)
    assert_proven(result)


def test_subnormal_weights_in_float16_that_count_do_not_pass_the_gate(tmp_path: Path) -> None:
    """What comes of them is made large again by the next layer, and with it what float16 lost of them."""
    targets = ["q_proj", "k_proj"]
    damage = _scale(v_proj=5e-6, o_proj=5e4)
    assert_proven(export_edge(tmp_path / "fp32", "none", damage=damage, target_modules=targets))
    with pytest.raises(ParityError) as caught:
        export_edge(tmp_path / "fp16", "none", mode=FP16, damage=damage, target_modules=targets)
    assert caught.value.exit_code == 4
    assert not (tmp_path / "fp16" / "out").exists()


# What an adapter of a vocabulary of 140 changes of its tables, and what the message must say of a base of 131.
RESIZED: dict[str, tuple[dict[str, Any], str, str, str]] = {
    "an embedding that is saved": ({"modules_to_save": ["embed_tokens"]}, "embed_tokens", "(140, 64)", "(131, 64)"),
    "a head that is saved": ({"modules_to_save": ["lm_head"]}, "lm_head", "(140, 64)", "(131, 64)"),
    "an adapted embedding": ({"target_modules": ["q_proj", "embed_tokens"]}, "embed_tokens", "(140, 64)", "(131, 64)"),
    "an adapted head": ({"target_modules": ["q_proj", "lm_head"]}, "lm_head", "(140, 64)", "(131, 64)"),
    "rows of new tokens": ({"trainable_token_indices": [5, 135]}, "embed_tokens", "up to 135", "(131, 64)"),
}


@pytest.mark.parametrize("mode", [{"merge": True}, {"merge": False, "branch": "fixed"}], ids=str)
@pytest.mark.parametrize("what", RESIZED)
def test_a_vocabulary_of_another_size_is_named(what: str, mode: dict[str, Any], tmp_path: Path) -> None:
    asked, tensor, found, expected = RESIZED[what]
    write_adapter(random_adapter(tiny_model("llama", vocab_size=140), **asked), tmp_path / "adapter")
    base = save_tiny("llama", "none", tmp_path / "base")
    before = tree(tmp_path)
    with pytest.raises(AdapterError) as caught:
        export_onnx(base, tmp_path / "adapter", output=tmp_path / "out", quantization="nf4", **mode)
    details = caught.value.details
    assert caught.value.exit_code == 3
    assert str(tmp_path / "adapter") in details["file"]
    assert tensor in details["tensor"]
    assert found in details["found"]
    assert expected in details["expected"]
    assert details["remedy"]
    assert tree(tmp_path) == before


def _run(session: OnnxSession, ids: torch.Tensor, sizes: list[int], room: int | None = None) -> torch.Tensor:
    """Logits of rows without padding that go in by pieces, after a cache of no tokens."""
    cache = session.empty_cache(len(ids), room or 0)
    assert {value.shape()[2] for value in cache.values()} == {(room or 0) * session.writes_in_place}
    parts, end = [], 0
    for size in sizes:
        mask = np.ones((len(ids), end + size), np.int64)
        logits, cache = session.forward(ids[:, end : end + size].numpy(), mask, cache)
        parts.append(torch.from_numpy(logits))
        end += size
    assert end == ids.shape[1]
    return torch.cat(parts, dim=1)


def _assert_is_the_twin(
    found: torch.Tensor, base: Path, adapter: Path, ids: torch.Tensor, method: Literal["none", "nf4"] = "nf4"
) -> None:
    """And the twin without the adapter is not."""
    mask = torch.ones_like(ids)
    twin = load_twin(TrainingBase(base, QuantizationScheme(method=method)))
    bare = compute_logits(twin, ids, mask)
    expected = compute_logits(load_adapter(twin, adapter).eval(), ids, mask)
    assert float((found - expected).abs().max()) < TOLERANCE
    assert float((found - bare).abs().max()) > 100 * TOLERANCE


@pytest.mark.parametrize("cache", ["growing", "in-place"])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_past_of_no_tokens_and_then_some(batch: int, cache: str, tiny_export: ExportFactory) -> None:
    base, adapter, result = tiny_export("llama", "nf4", cache=cache)
    session, ids = OnnxSession(result.output), token_ids(batch, 12)
    for sizes, room in (([7, 1, 1, 1, 1, 1], None), ([1] * 12, 12), ([12], 12)):
        _assert_is_the_twin(_run(session, ids, sizes, room), base, adapter, ids)


@pytest.mark.parametrize(("family", "cache"), [("llama", "growing"), ("llama", "in-place"), ("gpt2", "growing")])
def test_a_context_that_is_just_full_and_one_token_more(family: str, cache: str, branch_export: BranchFactory) -> None:
    export = branch_export(family, "nf4", None, cache=cache)
    session, limit = OnnxSession(export.output), next(iter(SHORT[family].values()))
    assert session.context_length == limit
    ids = token_ids(2, limit + 1)
    full = ids[:, :limit]
    for sizes in ([limit], [limit - 3, 1, 1, 1]):
        _assert_is_the_twin(_run(session, full, sizes, limit), export.base_dir, export.adapters["own"], full)
    for sizes in ([limit + 1], [limit, 1], [limit - 1, 2]):
        with pytest.raises(UsageError, match="more tokens than the model has positions for") as caught:
            _run(session, ids, sizes, limit + 1)
        assert caught.value.details["found"].startswith(f"{limit + 1} tokens")
        assert caught.value.details["expected"] == f"at most {limit}"
        assert caught.value.details["remedy"]


@pytest.mark.parametrize("cache", ["growing", "in-place"])
def test_padding_takes_a_place_only_in_place(cache: str, branch_export: BranchFactory) -> None:
    session = OnnxSession(branch_export("llama", "nf4", None, cache=cache).output)
    ids = token_ids(2, 21)
    mask = np.ones((2, 21), np.int64)
    mask[:, :3] = 0
    if cache == "growing":
        alone, _ = session.forward(ids[:, 3:].numpy(), np.ones((2, 18), np.int64))
        padded, _ = session.forward(ids.numpy(), mask)
        assert np.abs(padded[:, 3:] - alone).max() < TOLERANCE
        return
    with pytest.raises(UsageError, match="more tokens than the model has positions for") as caught:
        session.forward(ids.numpy(), mask)
    assert "one by one" in caught.value.details["remedy"]


@pytest.mark.slow
def test_a_graph_of_ten_thousand_initializers(tmp_path: Path) -> None:
    """700 layers of 16 initializers each; without the gate, which runs such a model for minutes."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
    fields = {**sizes, "num_hidden_layers": 700, "head_dim": 8, "initializer_range": 0.05}
    base = save_tiny("llama", "none", tmp_path / "base", **fields)
    write_adapter(random_adapter(tiny_model("llama", **fields), r=1, scale=0.1), tmp_path / "adapter")
    asked: dict[str, Any] = {"merge": False, "branch": "fixed", "quantization": "none", "verify": False}
    output = export_onnx(base, tmp_path / "adapter", output=tmp_path / "out", **asked).output
    assert len(onnx.load(output / "model.onnx", load_external_data=False).graph.initializer) > 10_000
    ids = token_ids(2, 6)
    found = _run(OnnxSession(output), ids, [6])
    _assert_is_the_twin(found, base, tmp_path / "adapter", ids, "none")


def test_a_graph_beyond_what_a_file_can_hold_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of small tensors, which stay in the graph: once for the tensors' bytes, once for the nodes beside them."""
    base = save_tiny("llama", "none", tmp_path / "base", **SHORT["llama"])
    asked: dict[str, Any] = {"output": tmp_path / "out", "quantization": "nf4", "verify": False, "overwrite": True}
    written = export_onnx(base, **asked).output
    size, before = (written / "model.onnx").stat().st_size, tree(tmp_path)
    for limit in (500, size - 200):
        monkeypatch.setattr(writer, "LARGEST_GRAPH", limit)
        with pytest.raises(OutputError, match="larger than a file of its format can be") as caught:
            export_onnx(base, **asked)
        assert "model.onnx" in caught.value.details["file"]
        assert caught.value.details["tensor"] == "model.rotary_emb.cos_cache"
        assert str(limit) in caught.value.details["expected"]
        assert caught.value.details["remedy"]
        assert tree(tmp_path) == before
