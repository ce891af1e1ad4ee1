"""The session: any padding, with and without a cache, against transformers; and what it refuses."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from lora_deploy.adapter import load_adapter
from lora_deploy.errors import CheckpointError, UsageError
from lora_deploy.quantization import QuantizationScheme
from lora_deploy.quantization.base import TrainingBase
from lora_deploy.run import OnnxModel, OnnxSession
from lora_deploy.verify.reference import compute_logits, load_twin
from tests.conftest import TINY_FAMILIES, token_ids
from tests.export.conftest import ExportFactory

LENGTHS = (12, 7, 1)


def _mask(padding: str) -> torch.Tensor:
    """(3, 12), rows of different lengths."""
    mask = torch.ones(3, 12, dtype=torch.int64)
    for row, length in enumerate(LENGTHS):
        if padding == "left":
            mask[row, : 12 - length] = 0
        elif padding == "right":
            mask[row, length:] = 0
    return mask


def _decode(session: OnnxSession, ids: np.ndarray, mask: np.ndarray, sizes: list[int]) -> np.ndarray:
    """Logits of a batch that goes in by pieces."""
    parts, cache, end = [], None, 0
    for size in sizes:
        logits, cache = session.forward(ids[:, end : end + size], mask[:, : end + size], cache)
        parts.append(logits)
        end += size
    assert end == ids.shape[1]
    return np.concatenate(parts, axis=1)


@pytest.mark.parametrize("sizes", [[17], [12, 1, 1, 1, 1, 1], [12, 3, 2], [1] * 17], ids=str)
@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_prefill_and_cached_decoding_are_what_transformers_computes(
    family: str, padding: str, sizes: list[int], tiny_export: ExportFactory
) -> None:
    base, adapter, result = tiny_export(family, "nf4")
    twin = load_adapter(load_twin(TrainingBase(base, QuantizationScheme(method="nf4"))), adapter).eval()
    ids = token_ids(3, 17)
    mask = torch.cat([_mask(padding), torch.ones(3, 5, dtype=torch.int64)], dim=1)
    expected = compute_logits(twin, ids, mask).numpy()
    found = _decode(OnnxSession(result.output), ids.numpy(), mask.numpy(), sizes)
    assert found.shape == expected.shape
    tokens = mask.numpy().astype(bool)
    assert np.abs(found - expected)[tokens].max() < 1e-4
    assert np.abs(expected[tokens]).max() > 1


def test_padding_does_not_change_what_a_row_computes(tiny_export: ExportFactory) -> None:
    """Without transformers: a row alone is the row in a padded batch."""
    _, _, result = tiny_export("llama", "nf4")
    session, ids = OnnxSession(result.output), token_ids(3, 12).numpy()
    for padding in ("left", "right"):
        mask = _mask(padding).numpy()
        batch, _ = session.forward(ids, mask)
        for row in range(3):
            tokens = mask[row].astype(bool)
            alone, _ = session.forward(ids[row : row + 1, tokens], np.ones((1, tokens.sum()), np.int64))
            assert np.abs(batch[row, tokens] - alone[0]).max() < 1e-4


def test_an_empty_cache_is_the_same_as_none(tiny_export: ExportFactory) -> None:
    _, _, result = tiny_export("gpt2", "nf4")
    session, ids = OnnxSession(result.output), token_ids().numpy()
    first, cache = session.forward(ids, np.ones_like(ids))
    again, _ = session.forward(ids, np.ones_like(ids), session.empty_cache(len(ids)))
    assert np.array_equal(first, again)
    assert len(cache) == 4
    assert {value.shape()[2] for value in cache.values()} == {ids.shape[1]}


def test_float16_comes_back_as_float32(tiny_export: ExportFactory) -> None:
    _, _, result = tiny_export("llama", "nf4", precision="fp16")
    ids = token_ids().numpy()
    logits, _ = OnnxSession(result.output / "model.onnx").forward(ids, np.ones_like(ids))
    assert logits.dtype == np.float32
    assert np.isfinite(logits).all()


@pytest.mark.parametrize("provider", ["tpu", "dml"])
@pytest.mark.parametrize("kind", [OnnxSession, OnnxModel])
def test_a_provider_that_is_not_there_is_an_error_of_usage(
    kind: Callable[..., object], provider: str, talking_export: Callable[..., tuple[Path, Path]]
) -> None:
    with pytest.raises(UsageError, match="does not have this provider") as caught:
        kind(talking_export()[1], provider=provider)
    assert "CPUExecutionProvider" in caught.value.details["found"]
    assert "lora-deploy[gpu]" in caught.value.details["remedy"]


def test_without_onnxruntime_the_message_says_how_to_get_it(
    tiny_export: ExportFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, _, result = tiny_export("llama", "nf4")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UsageError, match="onnxruntime is not installed") as caught:
        OnnxSession(result.output)
    assert 'pip install "lora-deploy[cpu]"' in caught.value.details["remedy"]


@pytest.mark.parametrize("kind", ["missing", "garbage", "without its weights"])
def test_a_model_that_cannot_be_opened_is_named(kind: str, talking: Path) -> None:
    file = talking / "model.onnx"
    if kind == "missing":
        file.unlink()
    elif kind == "garbage":
        file.write_bytes(b"\xff" * 64)
    else:
        file = next(talking.glob("*.data"))
        file.unlink()
    with pytest.raises(CheckpointError) as caught:
        OnnxSession(talking)
    assert caught.value.details["file"] == str(file)
    assert caught.value.exit_code == 3
