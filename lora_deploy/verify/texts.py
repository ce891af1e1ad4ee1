"""Two functions compared on texts, where each text's author wrote on: what users feel of a difference."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from pydantic import BaseModel

from lora_deploy.requantize.text import Text
from lora_deploy.train.data import IGNORED

__all__ = ["Logits", "TextResult", "compare_on_text"]

# Token ids and mask, (batch, length) each, to float32 logits (batch, length, vocabulary).
Logits = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

_ROWS = 4  # at once: logits are large


class TextResult(BaseModel):
    """How two functions differ on one text.

    Attributes:
        name: "task" or "general".
        source: The file; empty for random tokens.
        tokens: How many were predicted.
        kl: Mean Kullback-Leibler divergence from the reference, nats a token.
        top1: Share of tokens whose most probable successor is the same.
        loss: Mean cross entropy of the text, nats a token.
        reference_loss: The same of the reference.
    """

    name: str
    source: str = ""
    tokens: int
    kl: float
    top1: float
    loss: float
    reference_loss: float


def compare_on_text(text: Text, reference: Logits, found: Logits) -> TextResult:
    """Measure where the text has labels: on the answers of a task, on everything of a plain text.

    Args:
        text: The text.
        reference: What was trained.
        found: What is compared with it.
    """
    kls, agree, losses, own = [], [], [], []
    for batch in text.batches(_ROWS):
        labels = batch.labels[:, 1:]
        keep = labels != IGNORED
        expected, got = (
            function(batch.input_ids, batch.attention_mask)[:, :-1][keep].double() for function in (reference, found)
        )
        log_p, log_q = expected.log_softmax(-1), got.log_softmax(-1)
        kls.append((log_p.exp() * (log_p - log_q)).sum(-1))
        agree.append(log_p.argmax(-1) == log_q.argmax(-1))
        losses.append(F.nll_loss(log_q, labels[keep].long(), reduction="none"))
        own.append(F.nll_loss(log_p, labels[keep].long(), reduction="none"))
    return TextResult(
        name=text.name,
        source=text.source,
        tokens=sum(map(len, kls)),
        kl=float(torch.cat(kls).mean().clamp(min=0)),
        top1=float(torch.cat(agree).double().mean()),
        loss=float(torch.cat(losses).mean()),
        reference_loss=float(torch.cat(own).mean()),
    )
