"""Padding and packing: a batch computes what its examples compute alone."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

from lora_deploy.data.examples import IGNORED, Example
from lora_deploy.errors import UsageError
from lora_deploy.train.batches import EpochSampler, check_packing, collate_packed, collate_padded, pack
from tests.conftest import tiny_model, token_ids


def example(length: int, seed: int = 0) -> Example:
    ids = token_ids(1, length, seed)[0].int()
    labels = ids.clone()
    labels[: max(1, length // 3)] = IGNORED
    return Example(ids, labels)


ROWS = [[example(5, 1), example(7, 2)], [example(9, 3)], [example(3, 4), example(4, 5), example(2, 6)]]


def run(model: torch.nn.Module, batch: dict[str, Any]) -> tuple[torch.Tensor, float, int]:
    """Logits, the sum of the losses and the number of learned tokens."""
    batch = {name: values for name, values in batch.items() if name != "num_tokens"}
    with torch.no_grad():
        output = model(**batch, use_cache=False)
    count = int((batch["labels"][:, 1:] != IGNORED).sum())
    return output.logits, float(output.loss) * count, count


def alone(model: torch.nn.Module, one: Example) -> tuple[torch.Tensor, float, int]:
    ids, labels = one.input_ids.long()[None], one.labels.long()[None]
    return run(model, {"input_ids": ids, "labels": labels})


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_packed_examples_compute_what_they_compute_alone(family: str) -> None:
    model = tiny_model(family)
    batch = collate_packed(ROWS, pad_id=0)
    logits, loss, count = run(model, batch)
    expected_loss, expected_count = 0.0, 0
    for index, row in enumerate(ROWS):
        at = 0
        for one in row:
            own, own_loss, own_count = alone(model, one)
            torch.testing.assert_close(logits[index, at : at + len(one)], own[0], rtol=1e-5, atol=1e-5)
            at += len(one)
            expected_loss += own_loss
            expected_count += own_count
    assert count == expected_count
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert batch["num_tokens"] == 5 + 7 + 9 + 3 + 4 + 2


def test_without_new_positions_packed_examples_would_see_each_other() -> None:
    model = tiny_model("llama")
    batch = collate_packed(ROWS[:1], pad_id=0)
    batch["position_ids"] = torch.arange(12)[None]
    own, _, _ = alone(model, ROWS[0][1])
    assert (run(model, batch)[0][0, 5:] - own[0]).abs().max() > 1e-2


def test_padded_examples_compute_what_they_compute_alone() -> None:
    model = tiny_model("llama")
    rows = [[example(5, 1)], [example(9, 3)]]
    batch = collate_padded(rows, pad_id=7)
    logits, loss, _ = run(model, batch)
    singles = [alone(model, row[0]) for row in rows]
    for index, (own, _, _) in enumerate(singles):
        torch.testing.assert_close(logits[index, : own.shape[1]], own[0], rtol=1e-5, atol=1e-5)
    assert loss == pytest.approx(sum(single[1] for single in singles), rel=1e-5)
    assert batch["input_ids"][0].tolist() == [*rows[0][0].input_ids.tolist(), 7, 7, 7, 7]
    assert batch["attention_mask"].sum(dim=1).tolist() == [5, 9]
    assert batch["labels"][0, 5:].tolist() == [IGNORED] * 4
    assert batch["num_tokens"] == 14


def test_packing_fills_the_fullest_row_that_has_room() -> None:
    lengths = [3, 6, 4, 7, 2, 5, 3]
    rows = pack([example(length) for length in lengths], max_length=10)
    assert [[len(one) for one in row] for row in rows] == [[7, 3], [6, 4], [5, 3, 2]]


def test_packing_loses_and_repeats_nothing() -> None:
    examples = [example(2 + index % 9, index) for index in range(50)]
    rows = pack(examples, max_length=12)
    assert sorted(id(one) for row in rows for one in row) == sorted(map(id, examples))
    assert max(sum(map(len, row)) for row in rows) <= 12
    assert len(rows) < 50


def test_a_model_that_packs_rightly_passes_the_check_and_keeps_its_mode() -> None:
    model = tiny_model("llama").train()
    check_packing(model, torch.device("cpu"))
    assert model.training


def test_a_model_that_attends_across_examples_is_refused() -> None:
    model = tiny_model("llama")
    forward = model.forward

    def leaking(input_ids: torch.Tensor, position_ids: torch.Tensor, **options: Any) -> Any:
        return forward(input_ids=input_ids, **options)

    model.forward = leaking  # type: ignore[method-assign]
    with pytest.raises(UsageError, match="attends from one packed example"):
        check_packing(model, torch.device("cpu"))


def test_a_model_without_positions_is_refused() -> None:
    model = torch.nn.Linear(2, 2)
    assert "position_ids" not in inspect.signature(model.forward).parameters
    with pytest.raises(UsageError, match="takes no position_ids"):
        check_packing(model, torch.device("cpu"))


def test_the_order_depends_on_the_epoch_and_the_seed_only() -> None:
    epoch = 0
    sampler = EpochSampler(20, seed=5, epoch=lambda: epoch)
    first = list(sampler)
    torch.rand(3)
    assert list(sampler) == first
    assert sorted(first) == list(range(20))
    epoch = 1
    assert list(sampler) != first
    assert list(EpochSampler(20, seed=6, epoch=lambda: 0)) != first
