"""Two functions compared on texts, where each text's author wrote on: what users feel of a difference."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from pydantic import BaseModel

from lora_deploy.data.examples import IGNORED
from lora_deploy.requantize.text import Text

__all__ = ["Logits", "TextResult", "compare_on_text"]

# Token ids and mask, (batch, length) each, to float32 logits (batch, length, vocabulary).
Logits = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

_ROWS = 4  # at once: logits are large


class TextResult(BaseModel):
    """How two functions differ on one text.

    Attributes:
        name: "task", "general", or of a batch of texts to classify.
        source: The file's name, without its directory; empty for random tokens, and for a batch.
        tokens: How many were predicted; of a classifier, how many texts.
        kl: Mean Kullback-Leibler divergence from the reference, nats a token.
        top1: Share of tokens whose most probable successor is the same.
        loss: Mean cross entropy of the text, nats a token; None where it is not known what should be predicted.
        reference_loss: The same of the reference.
        base_kl: As `kl`, of the reference's base without its low-rank update: how much there is to lose; None where
            there is no update.
        held_out: Whether the rounding was not calibrated on it.
    """

    name: str
    source: str = ""
    tokens: int
    kl: float
    top1: float
    loss: float | None = None
    reference_loss: float | None = None
    base_kl: float | None = None
    held_out: bool = True


def compare_on_text(text: Text, reference: Logits, found: Logits, without: Logits | None = None) -> TextResult:
    """Measure where the text has labels: on the answers of a task, on everything of a plain text.

    Args:
        text: The text.
        reference: What was trained.
        found: What is compared with it.
        without: The reference without its update.
    """
    kls, agree, losses, own, base_kls = [], [], [], [], []
    for batch in text.batches(_ROWS):
        labels = batch.labels[:, 1:]
        keep = labels != IGNORED
        wanted = labels[keep].long()

        def log_probabilities(function: Logits, batch: Text = batch, keep: torch.Tensor = keep) -> torch.Tensor:
            logits = function(batch.input_ids, batch.attention_mask)[:, :-1]
            return logits[keep].double().log_softmax(-1)

        log_p, log_q = log_probabilities(reference), log_probabilities(found)
        kls.append(_divergence(log_p, log_q))
        agree.append(log_p.argmax(-1) == log_q.argmax(-1))
        losses.append(F.nll_loss(log_q, wanted, reduction="none"))
        own.append(F.nll_loss(log_p, wanted, reduction="none"))
        if without is not None:
            base_kls.append(_divergence(log_p, log_probabilities(without)))
    return TextResult(
        name=text.name,
        source=Path(text.source).name,
        tokens=sum(map(len, kls)),
        kl=float(torch.cat(kls).mean().clamp(min=0)),
        top1=float(torch.cat(agree).double().mean()),
        loss=float(torch.cat(losses).mean()),
        reference_loss=float(torch.cat(own).mean()),
        base_kl=float(torch.cat(base_kls).mean().clamp(min=0)) if base_kls else None,
        held_out=text.held_out,
    )


def _divergence(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    return (log_p.exp() * (log_p - log_q)).sum(-1)
