"""What a study trains on and what it judges on, and how an adapter is judged."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lora_deploy.adapter import apply_adapter, read_adapter
from lora_deploy.data.encode import encode
from lora_deploy.data.examples import IGNORED, Example, load_examples, read_records
from lora_deploy.errors import DataError
from lora_deploy.quantization.base import TrainingBase
from lora_deploy.train.batches import collate_padded
from lora_deploy.verify.reference import load_twin

__all__ = ["HeldOut", "Judgement", "judge", "split_data"]

_ROWS = 4  # whose loss is computed at once: logits are large
_ASKED = 20  # prompts that are answered at once: a step reads all weights, for however many rows
_SPARE = 8  # tokens that an answer may take beyond the longest right one, in another spelling of the same text


class Judgement(BaseModel):
    """How good a model is on held-out data.

    Attributes:
        loss: Mean over the learned tokens, nats a token.
        exact: Share of the prompts that are answered exactly, greedily, end token included; None without prompts.
        answered: How many prompts were.
    """

    loss: float
    exact: float | None
    answered: int


@dataclass(frozen=True)
class Question:
    """A prompt and its answer.

    Attributes:
        prompt: Token ids, as the model is asked.
        answer: Token ids, the end token included.
        text: The answer.
    """

    prompt: list[int]
    answer: list[int]
    text: str


@dataclass(frozen=True)
class HeldOut:
    """Rows that no run is trained on.

    Attributes:
        examples: All of them.
        questions: Those that are prompt and completion, as many as are to be answered.
        tokenizer: The base's.
    """

    examples: Sequence[Example]
    questions: Sequence[Question]
    tokenizer: PreTrainedTokenizerBase

    @property
    def end_token(self) -> int:
        """What the training taught to stop with: the end of an assistant's turn, or of a text."""
        last = self.questions[0].answer[-1]
        special = last in self.tokenizer.all_special_ids
        return int(last if special or self.tokenizer.eos_token_id is None else self.tokenizer.eos_token_id)

    @classmethod
    def load(
        cls, file: Path, tokenizer: PreTrainedTokenizerBase, max_length: int, *, chat_template: bool, answers: int
    ) -> HeldOut:
        """Read and tokenize a JSONL file.

        Args:
            file: The rows.
            tokenizer: The base's.
            max_length: Tokens that are kept of a row; a longer one is not asked.
            chat_template: Whether prompts go through the tokenizer's chat template, if it has one.
            answers: How many prompts are answered at most.

        Raises:
            DataError: A line is malformed, or nothing is left.
        """
        examples = load_examples(file, tokenizer, max_length, chat_template=chat_template).kept
        questions: list[Question] = []
        for number, record in read_records(file):
            if "prompt" in record and record["completion"] and len(questions) < answers:
                ids, learned = encode(f"{file}, line {number}", record, tokenizer, chat_template)
                start = learned.index(True)
                stop = len(learned) - learned[::-1].index(True)
                if stop <= max_length:
                    questions.append(Question(ids[:start], ids[start:stop], record["completion"]))
        return cls(examples, questions, tokenizer)


def split_data(data: Path, fraction: float, train: Path, held_out: Path) -> None:
    """Keep a part of the rows, the same for every run.

    Args:
        data: JSONL.
        fraction: The part; at least one row.
        train: Where the rows to train on go.
        held_out: Where the others go.

    Raises:
        DataError: The data is malformed, or too little to split.
    """
    rows = [json.dumps(record, ensure_ascii=False) + "\n" for _, record in read_records(data)]
    count = max(1, round(len(rows) * fraction))
    if count >= len(rows):
        raise DataError(
            "there are too few rows to keep some for judging",
            file=data,
            found=f"{len(rows)} rows, of which {count} would be kept",
            remedy="lower --held-out-fraction, or give --held-out",
        )
    kept = set(random.Random(0).sample(range(len(rows)), count))
    for file, wanted in ((train, False), (held_out, True)):
        file.write_text("".join(row for at, row in enumerate(rows) if (at in kept) == wanted), encoding="utf-8")


def judge(base: TrainingBase, adapter: Path | None, held_out: HeldOut) -> Judgement:
    """Judge an adapter on the dequantized twin of its base, in float32: what an exact export computes.

    Args:
        base: What it was trained on.
        adapter: Its directory; None for the base alone.
        held_out: The rows.
    """
    model: Any = load_twin(base)
    if adapter is not None:
        apply_adapter(model, read_adapter(adapter))
    model.eval()
    right = list(_answers(model, held_out))
    exact = sum(right) / len(right) if right else None
    return Judgement(loss=_loss(model, held_out.examples), exact=exact, answered=len(right))


@torch.inference_mode()
def _loss(model: PreTrainedModel, examples: Sequence[Example]) -> float:
    """Each learned token counts once, whatever the batches."""
    total, count = 0.0, 0
    for start in range(0, len(examples), _ROWS):
        batch = collate_padded([[example] for example in examples[start : start + _ROWS]], pad_id=0)
        batch.pop("num_tokens")
        learned = int((batch["labels"][:, 1:] != IGNORED).sum())
        total += float(model(**batch).loss) * learned
        count += learned
    return total / count


@torch.inference_mode()
def _answers(model: Any, held_out: HeldOut) -> Iterator[bool]:
    """Whether each prompt, padded on the left, is answered exactly; an answer that does not end is not."""
    tokenizer = held_out.tokenizer
    for start in range(0, len(held_out.questions), _ASKED):
        some = held_out.questions[start : start + _ASKED]
        longest = max(len(question.prompt) for question in some)
        ids = torch.zeros(len(some), longest, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, question in enumerate(some):
            ids[row, longest - len(question.prompt) :] = torch.tensor(question.prompt)
            mask[row, longest - len(question.prompt) :] = 1
        limit = max(len(question.answer) for question in some) + _SPARE
        end = held_out.end_token
        found = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=limit,
            do_sample=False,
            eos_token_id=end,
            pad_token_id=end,
        )
        for question, tokens in zip(some, found[:, longest:].tolist(), strict=True):
            ended = end in tokens
            text = tokenizer.decode(tokens[: tokens.index(end)], skip_special_tokens=True) if ended else ""
            yield ended and text == question.text
