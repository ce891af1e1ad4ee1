"""What is compared: batches padded on the right, on the left, and a single row, each with tokens to decode."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import AutoTokenizer

from lora_deploy.quantization.base import TrainingBase
from lora_deploy.task import Task, is_classification

__all__ = ["Batch", "make_batches"]

# Sentences of different lengths, so that every batch is padded; what they say does not matter.
_TEXTS = (
    "The history of printing begins long before Gutenberg: in China, whole pages were carved into wood, inked, and "
    "rubbed onto paper, and by the eleventh century movable type of baked clay was known.",
    "Write a short list of three things that a careful engineer checks before a release.",
    "def add(a, b):\n    return a + b",
    "What is the capital of France, and which river runs through it? Answer in one sentence, please.",
)
# Tokens of the rows that are padded, of the row that stands alone, and of those decoded one by one after each.
_SHORT, _LONG, _DECODED = 48, 160, 16


@dataclass(frozen=True)
class Batch:
    """Rows of tokens, padded to one length, the last few of which are decoded one by one from the cache.

    Attributes:
        name: For the report.
        input_ids: int64 (batch, length).
        attention_mask: int64 (batch, length).
        decoded: How many tokens at the end are decoded.
        task: Of the model. A classifier decodes nothing; one of sequences gives logits for each row, "of one token".
    """

    name: str
    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    decoded: int
    task: Task = "causal-lm"

    def phases(self) -> list[tuple[str, slice, torch.Tensor]]:
        """What is compared apart: a name, which of the logits, and their mask.

        Prefill and decoding, so that the many tokens of the one do not hide the few of the other.
        """
        if self.task == "sequence-classification":
            return [(self.name, slice(None), torch.ones_like(self.attention_mask[:, :1]))]
        start, mask = self.prefilled, self.attention_mask
        if is_classification(self.task):
            return [(self.name, slice(None), mask)]
        return [
            (f"prefill, {self.name}", slice(None, start), mask[:, :start]),
            (f"decode, {self.name}", slice(start, None), mask[:, start:]),
        ]

    @property
    def tells_apart(self) -> bool:
        """Whether the base alone must fail here. One text may be a clear case for a classifier without its update."""
        return self.task != "sequence-classification" or len(self.input_ids) > 1

    @property
    def prefilled(self) -> int:
        """How many tokens go in at once."""
        return self.input_ids.shape[1] - self.decoded


def make_batches(base: TrainingBase) -> list[Batch]:
    """The batches to compare: one padded on the right, one padded on the left, and a single long row."""
    is_classifier = is_classification(base.task)
    padding, context = 0, getattr(base.config, "max_position_embeddings", 2 * _LONG)
    if is_classifier:
        padding = base.config.pad_token_id or 0
        # RoBERTa's kind counts positions from pad_token_id + 1. Where that id is large, the model is of another kind.
        context -= padding + 1 if padding + 1 < context // 2 else 0
    decoded = 0 if is_classifier else min(_DECODED, context // 2)
    *rows, long = _token_rows(base, context - decoded)
    if base.task == "sequence-classification":  # a row is only one prediction, so there are three times as many
        rows += [row[: max(len(row) // part, 1)] for part in (2, 4) for row in rows]
    more = torch.randint(0, base.config.vocab_size, (len(rows), decoded), generator=torch.Generator().manual_seed(1))
    batches = []
    for name, some in (("right-padded", rows), ("left-padded", rows), ("single", [long])):
        ids, mask = _pad(some, padding, left=name == "left-padded")
        grown = more[: len(some)]
        ids, mask = torch.cat([ids, grown], dim=1), torch.cat([mask, torch.ones_like(grown)], dim=1)
        batches.append(Batch(name, ids, mask, decoded, base.task))
    return batches


def _token_rows(base: TrainingBase, room: int) -> list[torch.Tensor]:
    """Four rows of different lengths and a long one; random tokens where the base has no tokenizer that can be read."""
    short, long = min(_SHORT, room), min(_LONG, room)
    try:
        tokenizer = AutoTokenizer.from_pretrained(base.directory, trust_remote_code=False)
        rows = [tokenizer(text)["input_ids"][:short] for text in _TEXTS]
    except Exception:  # what transformers raises for a missing or a damaged tokenizer has no common base
        rows = []
    if rows and all(rows):  # for some kinds of models a missing tokenizer is one that knows no word
        everything = [token for row in rows for token in row] * _LONG
        return [torch.tensor(row) for row in [*rows, everything[:long]]]
    generator = torch.Generator().manual_seed(0)
    lengths = (short, max(short // 2, 1), max(short // 4, 2), max(short - 3, 1), long)
    return [torch.randint(0, base.config.vocab_size, (length,), generator=generator) for length in lengths]


def _pad(rows: list[torch.Tensor], padding: int, *, left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    length = max(len(row) for row in rows)
    ids = torch.full((len(rows), length), padding)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        place = slice(length - len(row), length) if left else slice(0, len(row))
        ids[number, place] = row
        mask[number, place] = 1
    return ids, mask
