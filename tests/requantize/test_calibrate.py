"""The streamed pass: it computes what the model computes, and what it rounds keeps the model's function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from lora_deploy.adapter import load_adapter, read_adapter
from lora_deploy.export.merge import MergedParameters
from lora_deploy.quantization import QuantizationScheme
from lora_deploy.quantization.base import TrainingBase
from lora_deploy.requantize.budget import measure_sensitivity, spend_budget
from lora_deploy.requantize.calibrate import calibrate
from lora_deploy.requantize.options import Requantization, mean_bits
from lora_deploy.requantize.rounding import round_plain
from lora_deploy.requantize.streamed import cut, run_streamed
from lora_deploy.requantize.text import Text
from lora_deploy.verify.reference import load_twin
from tests.conftest import CheckpointFactory

NF4 = QuantizationScheme(method="nf4")
FAMILIES = ("llama", "qwen2", "gpt2")


@pytest.fixture
def merged(request: pytest.FixtureRequest, checkpoint_dir: CheckpointFactory) -> tuple[TrainingBase, Path]:
    """A base, and an adapter's directory."""
    family, _, setting = request.param.partition(" ")
    directory = request.getfixturevalue("adapter_dir")(family, **({setting: True} if setting else {}))
    return TrainingBase(checkpoint_dir(family), NF4), directory


def _text(base: TrainingBase, rows: int = 6, length: int = 12, seed: int = 0) -> Text:
    """Random tokens, every row of another length."""
    chance = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, base.config.vocab_size, (rows, length), generator=chance)
    mask = torch.ones_like(ids)
    for row in range(1, rows):
        mask[row, length - row :] = 0
    return Text("general", "", ids, ids.clone(), mask)


def test_batches_have_every_row_once_and_little_padding() -> None:
    lengths = torch.randint(1, 190, (60,), generator=torch.Generator().manual_seed(2))
    mask = (torch.arange(192) < lengths[:, None]).long()
    ids = torch.arange(60)[:, None].expand(60, 192)
    batches = cut(Text("general", "", ids, ids, mask))
    rows = torch.cat([batch.input_ids[:, 0] for batch in batches])
    assert sorted(rows.tolist()) == list(range(60))
    for batch in batches:
        row = batch.input_ids[:, 0]
        assert torch.equal(batch.attention_mask.sum(dim=1), lengths[row])
        assert batch.attention_mask.numel() <= 1024
    assert sum(batch.attention_mask.numel() for batch in batches) < 1.3 * int(lengths.sum())
    long = torch.ones(2, 5000, dtype=torch.int64)
    assert [len(batch) for batch in cut(Text("general", "", long, long, long))] == [1, 1]


def _twin(base: TrainingBase, adapter: Path) -> torch.nn.Module:
    return load_adapter(load_twin(base), adapter).eval()


def _hidden(twin: torch.nn.Module, text: Text) -> torch.Tensor:
    with torch.inference_mode():
        return twin.base_model(input_ids=text.input_ids, attention_mask=text.attention_mask)[0]  # type: ignore[operator]


@pytest.mark.parametrize("merged", [*FAMILIES, "llama lora_bias", "gpt2 lora_bias", "llama use_dora"], indirect=True)
def test_the_streamed_model_is_the_model(merged: tuple[TrainingBase, Path]) -> None:
    base, directory = merged
    parameters = MergedParameters(base, read_adapter(directory))
    text, seen = _text(base), []

    def linear(
        name: str, weight: torch.Tensor, bias: torch.Tensor | None, inputs: Sequence[torch.Tensor]
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        seen.append((name, len(inputs)))
        return lambda x: torch.nn.functional.linear(x, weight, bias)

    parts = [(text.input_ids[rows], text.attention_mask[rows]) for rows in (slice(0, 3), slice(3, 4), slice(4, 6))]
    found = torch.cat(run_streamed(parameters, parts, linear))
    expected = _hidden(_twin(base, directory), text)
    keep = text.attention_mask.bool()
    assert sorted(seen) == [(name, 3) for name in sorted(base.linears)]
    torch.testing.assert_close(found[keep], expected[keep], atol=1e-4, rtol=1e-4)
    alone = _hidden(load_twin(base), text)
    assert float((alone[keep] - expected[keep]).abs().max()) > 1e-2


@pytest.mark.parametrize("merged", FAMILIES, indirect=True)
def test_calibrated_codes_keep_more_of_the_function_than_plain_ones(merged: tuple[TrainingBase, Path]) -> None:
    base, directory = merged
    parameters = MergedParameters(base, read_adapter(directory))
    grids = dict.fromkeys(base.linears, (4, 16))
    text = _text(base, rows=32)
    expected, keep = _hidden(_twin(base, directory), text), text.attention_mask.bool()

    def error(texts: list[Text], correction: int = 0) -> float:
        found = {}
        calibrate(parameters, grids, texts, lambda name, w, u: found.update({name: (w, u)}), correction=correction)
        assert set(found) == set(grids)
        model = load_twin(base)
        for name, (rounded, update) in found.items():
            values = rounded.dequantize() + (update.delta_weight() if update is not None else 0)
            module = model.get_submodule(name)
            module.weight.data = values.t() if base.linears[name].is_conv1d else values  # type: ignore[union-attr]
        return float((_hidden(model, text)[keep] - expected[keep]).square().mean())

    plain, calibrated = error([]), error([text])
    assert calibrated < plain
    assert error([text], correction=8) < 0.7 * calibrated


@pytest.mark.parametrize("merged", ["llama"], indirect=True)
def test_without_a_text_every_weight_is_rounded_by_itself(merged: tuple[TrainingBase, Path]) -> None:
    base, directory = merged
    parameters = MergedParameters(base, read_adapter(directory))
    name = next(iter(base.linears))
    found = {}
    calibrate(parameters, {name: (8, 32)}, [], lambda key, weight, _: found.update({key: weight}))
    expected = round_plain(parameters.read(f"{name}.weight"), 8, 32)
    assert torch.equal(found[name].codes, expected.codes)


@pytest.mark.parametrize("merged", ["llama"], indirect=True)
def test_the_budget_goes_to_the_layers_that_gain_most(merged: tuple[TrainingBase, Path]) -> None:
    base, directory = merged
    parameters = MergedParameters(base, read_adapter(directory))
    texts = [_text(base)]
    asked = Requantization(4, head=None, budget_bits=5.5)
    sensitivity = measure_sensitivity(parameters, asked.grids(base), texts)
    assert set(sensitivity) == set(base.linears)
    assert all(0 < value < 0.5 for value in sensitivity.values())
    chosen = spend_budget(asked, parameters, texts)
    grids = {name: grid for name, grid in chosen.grids(base).items() if name in base.linears}
    assert chosen.budget_bits is None
    assert 4.5 < mean_bits(grids, base) <= 5.5
    sizes = {name: base.linears[name].shape[0] * base.linears[name].shape[1] for name in grids}
    gains = {name: sensitivity[name] / sizes[name] for name in grids}
    best = max(gains, key=lambda name: gains[name])
    assert grids[best] == (8, 32)
    more = spend_budget(Requantization(4, head=None, budget_bits=7.0), parameters, texts)
    assert {name for name, _ in chosen.keep} < {name for name, _ in more.keep}
