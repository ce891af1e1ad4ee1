"""The error of each layer, by its keys and values: by hand, and where one layer of a model is not what was trained."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from lora_deploy.export import export_onnx
from lora_deploy.quantization import QuantizationScheme
from lora_deploy.quantization.base import TrainingBase
from lora_deploy.run.session import OnnxSession
from lora_deploy.verify.batches import make_batches
from lora_deploy.verify.layers import Layers, errors_by_layer, layers_of, run_batches
from lora_deploy.verify.reference import compute_logits, load_twin
from lora_deploy.verify.sessions import Exported, Sessions
from tests.conftest import CheckpointFactory
from tests.export.conftest import SHORT


def _layers(*values: float, tokens: int = 3) -> Layers:
    """Keys of ones and values of a number, for each layer."""
    return [(torch.ones(1, 2, tokens, 4), torch.full((1, 2, tokens, 4), value)) for value in values]


def test_the_error_is_the_larger_of_the_two_relative_ones() -> None:
    assert errors_by_layer(_layers(2.0, 4.0), _layers(2.0, 3.0)) == [0.0, 0.25]
    keys = [(torch.full((1, 2, 3, 4), 1.5), values) for _, values in _layers(2.0, 3.0)]
    assert errors_by_layer(_layers(2.0, 4.0), keys) == [0.5, 0.5]


def test_what_cannot_be_compared_has_no_error() -> None:
    one = _layers(1.0)
    assert errors_by_layer(None, one) is None
    assert errors_by_layer(one, None) is None
    assert errors_by_layer(one, _layers(1.0, 1.0)) is None
    assert errors_by_layer(one, [(torch.ones(1, 2, 3, 5), torch.ones(1, 2, 3, 5))]) is None


def test_what_is_no_number_is_not_hidden() -> None:
    (error,) = errors_by_layer(_layers(1.0), _layers(math.nan)) or []
    assert math.isnan(error)
    assert errors_by_layer(_layers(0.0), _layers(0.0)) == [0.0]
    assert errors_by_layer(_layers(0.0), _layers(1.0)) == [math.inf]


def test_a_cache_that_forgets_is_compared_where_it_remembers() -> None:
    assert errors_by_layer(_layers(2.0, tokens=2), _layers(2.0, tokens=9)) == [0.0]
    assert errors_by_layer(_layers(2.0, tokens=2), _layers(1.0, tokens=9)) == [0.5]


@pytest.mark.parametrize("changed", [0, 1, None])
def test_a_layer_that_was_not_trained_so_is_found(
    changed: int | None, checkpoint_dir: CheckpointFactory, tmp_path: Path
) -> None:
    """Layers before it are right, it and those behind it are not."""
    place = checkpoint_dir("llama", **SHORT["llama"])
    result = export_onnx(place, output=tmp_path / "out", quantization="nf4", verify=False)
    base = TrainingBase(place, QuantizationScheme(method="nf4"))
    twin, batches = load_twin(base), make_batches(base)
    if changed is not None:
        twin.get_parameter(f"model.layers.{changed}.self_attn.v_proj.weight").mul_(1.1)
    exported = Exported(Sessions(OnnxSession(result.output), None, "fp32"), result.output, batches)
    errors = errors_by_layer(run_batches(twin, batches).layers, exported.run(None).layers)
    assert errors is not None
    for layer, error in enumerate(errors):
        if changed is None or layer < changed:
            assert error < 1e-5
        else:
            assert error > 0.01


def test_the_logits_are_those_without_a_cache(checkpoint_dir: CheckpointFactory) -> None:
    base = TrainingBase(checkpoint_dir("llama"))
    twin, batches = load_twin(base), make_batches(base)
    ran = run_batches(twin, batches)
    assert ran.layers is not None
    for batch, logits in zip(batches, ran.logits, strict=True):
        assert torch.equal(logits, compute_logits(twin, batch.input_ids, batch.attention_mask))


def test_padded_batches_and_models_without_a_cache_have_none(checkpoint_dir: CheckpointFactory) -> None:
    right, _, single = make_batches(TrainingBase(checkpoint_dir("llama")))
    assert layers_of(right, {"past_key_values.0.key": None, "past_key_values.0.value": None}) is None
    assert layers_of(single, {}) is None
    assert layers_of(single, {"past_key_values.1.key": None, "past_key_values.0.value": None}) is None
