"""The metrics, computed by hand, and the gate, which must reject what is not the trained function."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lora_deploy.adapter import load_adapter
from lora_deploy.errors import ParityError
from lora_deploy.quantization import QuantizationScheme
from lora_deploy.quantization.base import TrainingBase
from lora_deploy.verify.batches import make_batches
from lora_deploy.verify.cases import compare_batch
from lora_deploy.verify.metrics import compare_logits, is_within
from lora_deploy.verify.reference import compute_logits, load_twin
from lora_deploy.verify.report import CaseResult, Metrics, ParityReport
from lora_deploy.verify.tolerances import TOLERANCES, Tolerance
from tests.conftest import TINY_FAMILIES, VOCABULARY, CheckpointFactory
from tests.train.conftest import char_tokenizer

GOOD = Metrics(max_abs=0.0, mean_kl=0.0, max_kl=0.0, top1=1.0, tokens=9, ties=0)


def _logits(*rows: list[float]) -> torch.Tensor:
    """Logits (1, tokens, vocabulary) of given probabilities."""
    return torch.tensor([rows]).log()


def _mask(*rows: list[int]) -> torch.Tensor:
    return torch.tensor(rows)


def test_the_divergence_is_the_one_computed_by_hand() -> None:
    reference = _logits([0.5, 0.25, 0.25], [0.8, 0.1, 0.1])
    found = _logits([0.25, 0.5, 0.25], [0.8, 0.1, 0.1])
    metrics = compare_logits(reference, found, _mask([1, 1]), 0.0)
    one = 0.5 * math.log(2) + 0.25 * math.log(0.5)  # sum of p ln(p/q); the second token is the same
    assert metrics.max_kl == pytest.approx(one, rel=1e-6)
    assert metrics.mean_kl == pytest.approx(one / 2, rel=1e-6)
    assert metrics.max_abs == pytest.approx(math.log(2), rel=1e-6)
    assert (metrics.top1, metrics.tokens, metrics.ties) == (0.5, 2, 0)


def test_the_divergence_is_from_the_reference_not_to_it() -> None:
    reference, found = _logits([0.9, 0.1]), _logits([0.5, 0.5])
    expected = 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)
    assert compare_logits(reference, found, _mask([1]), 0.0).mean_kl == pytest.approx(expected, rel=1e-5)
    assert compare_logits(found, reference, _mask([1]), 0.0).mean_kl != pytest.approx(expected, rel=0.1)


def test_logits_that_are_shifted_are_the_same_distribution_but_not_the_same_logits() -> None:
    reference = torch.randn(2, 3, 7)
    metrics = compare_logits(reference, reference + 3, torch.ones(2, 3), 0.0)
    assert metrics.mean_kl < 1e-12
    assert metrics.max_abs == pytest.approx(3, rel=1e-5)
    assert not is_within(metrics, TOLERANCES["fp32"])


def test_a_tie_of_the_reference_is_not_counted_and_a_tie_of_the_export_is() -> None:
    reference = torch.tensor([[[1.0, 1.01, 0.0], [3.0, 1.0, 0.0], [1.0, 2.0, 0.0]]])
    found = torch.tensor([[[1.01, 1.0, 0.0], [1.0, 1.01, 0.0], [1.0, 2.0, 0.0]]])
    metrics = compare_logits(reference, found, _mask([1, 1, 1]), 0.1)
    assert (metrics.ties, metrics.tokens) == (1, 3)
    assert metrics.top1 == 0.5
    assert compare_logits(reference, found, _mask([1, 1, 1]), 0.0).top1 == pytest.approx(1 / 3)


def test_where_everything_is_a_tie_nothing_disagrees() -> None:
    metrics = compare_logits(torch.zeros(1, 2, 3), torch.randn(1, 2, 3) * 1e-3, _mask([1, 1]), 0.1)
    assert (metrics.ties, metrics.top1) == (2, 1.0)


@pytest.mark.parametrize("mask", [[0, 1, 1], [1, 1, 0]])
def test_padding_is_left_out_and_tokens_are_not(mask: list[int]) -> None:
    reference = torch.randn(2, 3, 5)
    found = reference.clone()
    padding = mask.index(0)
    found[1, padding] = float("nan")
    whole = [1, 1, 1]
    metrics = compare_logits(reference, found, _mask(whole, mask), 0.0)
    assert (metrics.max_abs, metrics.mean_kl, metrics.top1, metrics.tokens) == (0.0, 0.0, 1.0, 5)
    found = reference.clone()
    found[1, 1] += torch.arange(5.0)  # a token beside the padding
    assert compare_logits(reference, found, _mask(whole, mask), 0.0).max_abs == pytest.approx(4, rel=1e-5)


@pytest.mark.parametrize("row", TOLERANCES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", [(0, 0, 0), (1, 2, 4)])
def test_one_logit_that_is_not_finite_fails_every_tolerance(
    value: float, where: tuple[int, int, int], row: str
) -> None:
    reference = torch.randn(2, 3, 5)
    found = reference.clone()
    found[where] = value
    assert is_within(compare_logits(reference, reference, torch.ones(2, 3), 0.1), TOLERANCES[row])
    metrics = compare_logits(reference, found, torch.ones(2, 3), 0.1)
    assert not is_within(metrics, TOLERANCES[row])
    assert not math.isfinite(metrics.max_abs)
    assert math.isnan(metrics.mean_kl)
    assert not is_within(compare_logits(found, reference, torch.ones(2, 3), 0.1), TOLERANCES[row])


@pytest.mark.parametrize(
    ("change", "inside"),
    [
        ({}, True),
        ({"mean_kl": 1e-3}, True),
        ({"mean_kl": 1.1e-3}, False),
        ({"mean_kl": math.nan}, False),
        ({"top1": 0.9}, True),
        ({"top1": 0.89}, False),
        ({"top1": math.nan}, False),
        ({"max_abs": 0.5}, True),
        ({"max_abs": 0.51}, False),
        ({"max_abs": math.nan}, False),
    ],
)
def test_each_limit_is_a_limit(change: dict[str, float], inside: bool) -> None:
    tolerance = Tolerance(kl=1e-3, top1=0.9, tie_margin=0.1, max_abs=0.5)
    assert is_within(GOOD.model_copy(update=change), tolerance) is inside
    assert not is_within(None, tolerance)


def test_without_a_limit_on_single_logits_they_may_be_anything() -> None:
    unlimited = Tolerance(kl=1e-3, top1=0.9, tie_margin=0.1)
    assert is_within(GOOD.model_copy(update={"max_abs": 99.0}), unlimited)


@pytest.mark.parametrize("family", TINY_FAMILIES)
@pytest.mark.parametrize("row", TOLERANCES)
def test_every_tolerance_rejects_the_base_alone_and_accepts_the_trained_model(
    row: str, family: str, checkpoint_dir: CheckpointFactory, adapter_dir: Callable[..., Path]
) -> None:
    base = TrainingBase(checkpoint_dir(family), QuantizationScheme(method="nf4"))
    alone, trained = load_twin(base), load_adapter(load_twin(base), adapter_dir(family)).eval()
    batch = make_batches(base)[1]
    logits = [compute_logits(model, batch.input_ids, batch.attention_mask) for model in (trained, alone)]
    for control, passed in ((logits[1], False), (logits[0], True)):
        results = compare_batch("", batch, logits[0], control, None, TOLERANCES[row])
        assert [result.passed for result in results] == [passed, passed]


def test_a_finer_type_has_a_finer_tolerance() -> None:
    rows = [TOLERANCES[name] for name in ("fp32", "fp16", "bf16 weights", "bf16")]
    for finer, coarser in itertools.pairwise(rows):
        assert finer.kl < coarser.kl
        assert finer.top1 > coarser.top1
        assert finer.tie_margin < coarser.tie_margin


@pytest.mark.parametrize("with_tokenizer", [False, True])
def test_the_batches_are_padded_on_both_sides_and_not_at_all(
    with_tokenizer: bool, own_checkpoint: CheckpointFactory
) -> None:
    directory = own_checkpoint("llama")
    if with_tokenizer:
        char_tokenizer().save_pretrained(directory)
    base = TrainingBase(directory)
    right, left, single = make_batches(base)
    for batch in (right, left, single):
        assert batch.input_ids.shape == batch.attention_mask.shape
        assert batch.input_ids.max() < VOCABULARY
        assert batch.prefilled == batch.input_ids.shape[1] - 16
        assert batch.attention_mask[:, batch.prefilled :].all()  # what is decoded is never padding
    padded = [batch.attention_mask[:, : batch.prefilled] for batch in (right, left)]
    assert (padded[0].diff(dim=1) <= 0).all()
    assert (padded[1].diff(dim=1) >= 0).all()
    for mask in padded:
        assert len(set(mask.sum(1).tolist())) > 1
        assert (mask.sum(1) == mask.shape[1]).any()
    assert single.attention_mask.all()
    assert len(single.input_ids) == 1
    # The same tokens on either side, and the same ones each time.
    for row in range(len(right.input_ids)):
        tokens = [batch.input_ids[row][batch.attention_mask[row].bool()] for batch in (right, left)]
        assert torch.equal(*tokens)
    assert torch.equal(make_batches(base)[0].input_ids, right.input_ids)


def _report(cases: list[bool], control_failed: bool | None) -> ParityReport:
    results = [CaseResult(name=f"case {i}", export=GOOD, control=GOOD, passed=ok) for i, ok in enumerate(cases)]
    return ParityReport(
        precision="fp32",
        provider="cpu",
        tolerance=dataclasses.asdict(TOLERANCES["fp32"]),
        cases=results,
        control_failed=control_failed,
        passed=all(cases) and control_failed is not False,
    )


@pytest.mark.parametrize(
    ("cases", "control_failed", "message"),
    [
        ([True, True], True, None),
        ([True, True], None, None),
        ([True, False], True, "does not compute"),
        ([True, False], False, "does not compute"),
        ([True, True], False, "proves nothing"),
    ],
)
def test_a_report_that_does_not_hold_raises_with_what_does_not(
    cases: list[bool], control_failed: bool | None, message: str | None, tmp_path: Path
) -> None:
    report = _report(cases, control_failed)
    report.table()
    if message is None:
        report.require(tmp_path)
        assert report.failures() == ""
        return
    with pytest.raises(ParityError, match=message) as caught:
        report.require(tmp_path)
    assert caught.value.details["file"] == str(tmp_path)
    assert ("case 1" in caught.value.details["found"]) == (not all(cases))
    assert "case 0: max" not in caught.value.details["found"]
