"""How far two sets of logits are apart, and whether that is near enough."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from lora_deploy.verify.report import Metrics
from lora_deploy.verify.tolerances import Tolerance

__all__ = ["compare_logits", "is_within", "max_or_nan", "worst_of"]


def compare_logits(
    reference: torch.Tensor, found: torch.Tensor, attention_mask: torch.Tensor, tie_margin: float
) -> Metrics:
    """Measure how far two sets of logits are apart where there are tokens.

    Args:
        reference: (batch, length, vocabulary).
        found: The same shape.
        attention_mask: (batch, length); padding is left out.
        tie_margin: A token whose two most probable successors in the reference are closer than this is a tie.

    Returns:
        The metrics. NaN anywhere makes max_abs and the divergences NaN, which no tolerance accepts.
    """
    max_abs, agree, ties = 0.0, 0, 0
    divergences = []
    for row in range(reference.shape[0]):  # a row at a time: float64 over the whole vocabulary is large
        keep = attention_mask[row].bool()
        expected, got = reference[row, keep].double(), found[row, keep].double()
        max_abs = float(torch.maximum(torch.tensor(max_abs), (expected - got).abs().max()))
        log_p, log_q = expected.log_softmax(-1), got.log_softmax(-1)
        divergences.append((log_p.exp() * (log_p - log_q)).sum(-1))
        top = expected.topk(min(2, expected.shape[-1])).values  # a regression has one logit: a tie with itself
        tie = (top[:, 0] - top[:, -1]) < tie_margin
        ties += int(tie.sum())
        agree += int((tie | (expected.argmax(-1) == got.argmax(-1))).sum()) - int(tie.sum())
    divergence = torch.cat(divergences)
    decided = divergence.numel() - ties
    return Metrics(
        max_abs=max_abs,
        mean_kl=float(divergence.mean().clamp(min=0)),
        max_kl=float(divergence.max().clamp(min=0)),
        top1=agree / decided if decided else 1.0,
        tokens=divergence.numel(),
        ties=ties,
    )


def is_within(metrics: Metrics | None, tolerance: Tolerance) -> bool:
    """Whether the metrics pass the gate. Comparisons with NaN are false, so NaN fails."""
    if metrics is None:
        return False
    return (
        metrics.mean_kl <= tolerance.kl
        and metrics.top1 >= tolerance.top1
        and (tolerance.max_abs is None or metrics.max_abs <= tolerance.max_abs)
    )


def worst_of(metrics: Iterable[Metrics | None]) -> Metrics | None:
    """The worst of each metric, and all the tokens; None where there is none. NaN is worst."""
    found = [one for one in metrics if one is not None]
    if not found:
        return None
    largest = {key: max_or_nan(getattr(one, key) for one in found) for key in ("max_abs", "mean_kl", "max_kl")}
    return Metrics(
        **largest,
        top1=min(one.top1 for one in found),
        tokens=sum(one.tokens for one in found),
        ties=sum(one.ties for one in found),
    )


def max_or_nan(values: Iterable[float]) -> float:
    """The largest; NaN where there is one, which `max` may pass over."""
    kept = list(values)
    return math.nan if any(map(math.isnan, kept)) else max(kept)
