"""The text that quantization is calibrated on and measured with: the training data's own, and some of everything."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lora_deploy.data.encode import encode
from lora_deploy.data.examples import IGNORED, read_records
from lora_deploy.errors import CheckpointError, DataError
from lora_deploy.integrity import hash_file
from lora_deploy.quantization.base import TrainingBase

__all__ = ["GENERAL", "HELD_OUT", "Text", "load_text", "pick_text", "rows_taken"]

GENERAL = Path(__file__).with_name("calibration.jsonl")
"""Some of everything, written for this purpose: to calibrate on."""
HELD_OUT = Path(__file__).with_name("held_out.jsonl")
"""The same, of other subjects: to measure with."""

_LENGTH = 192  # tokens that are kept of a row


@dataclass(frozen=True, eq=False)
class Text:
    """Rows of tokens, padded on the right.

    Attributes:
        name: "task" or "general".
        source: The file; empty where the tokens are random ones.
        input_ids: int64 (rows, length).
        labels: int64 (rows, length): the token where a model is judged by how it predicts it, IGNORED elsewhere.
        attention_mask: int64 (rows, length).
        held_out: Whether none of the rows are among those that were to be left out.
    """

    name: str
    source: str
    input_ids: torch.Tensor
    labels: torch.Tensor
    attention_mask: torch.Tensor
    held_out: bool = True

    def __len__(self) -> int:
        return len(self.input_ids)

    def batches(self, rows: int) -> Iterator[Text]:
        """A few rows at a time, cut to their own length."""
        for start in range(0, len(self), rows):
            mask = self.attention_mask[start : start + rows]
            length = int(mask.sum(dim=1).max())
            yield replace(
                self,
                input_ids=self.input_ids[start : start + rows, :length],
                labels=self.labels[start : start + rows, :length],
                attention_mask=mask[:, :length],
            )


def load_text(name: str, file: Path, base: TrainingBase, rows: int, taken: int = 0) -> Text:
    """Rows of a JSONL file of training data, evenly from all of it.

    Args:
        name: "task" or "general".
        file: The file.
        base: The training base; its tokenizer reads the text.
        rows: At most so many.
        taken: How many rows an earlier call, with nothing taken, gave: it leaves those out, if any are left then.

    Raises:
        DataError: The file is missing or malformed.
    """
    tokenizer = _tokenizer(base)
    if tokenizer is None:
        return _random_text(name, base, rows, seed=1 if taken else 0)
    length = min(_LENGTH, base.config.max_position_embeddings)
    records = list(read_records(file))
    held_out = len(records) > taken
    if held_out:
        gone = set(_spread(len(records), taken))
        records = [record for number, record in enumerate(records) if number not in gone]
    encoded = [
        encode(f"{file}, line {records[at][0]}", _flatten(records[at][1], tokenizer), tokenizer, chat_template=True)
        for at in _spread(len(records), rows)
    ]
    kept = [(ids[:length], learned[:length]) for ids, learned in encoded if any(learned[1:length])]
    if not kept:
        raise DataError("the data has no text to calibrate on or to compare with", file=file)
    ids = [torch.tensor(row) for row, _ in kept]
    learned = [torch.tensor(marks) for _, marks in kept]
    labels = [torch.where(mark, row, IGNORED) for row, mark in zip(ids, learned, strict=True)]
    return replace(_pad(name, str(file), ids, labels), held_out=held_out)


def _flatten(record: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """A chat as plain text, for a tokenizer that has no template."""
    if "messages" not in record or tokenizer.chat_template:
        return record
    return {"text": "\n\n".join(message["content"] for message in record["messages"])}


def pick_text(
    base: TrainingBase,
    given: Path | None,
    data: Sequence[str | None],
    rows: int,
    *,
    own: int | None = None,
    general: Path = GENERAL,
    taken: Mapping[str, int] | None = None,
) -> list[Text]:
    """A quarter of the rows from the training data, if any of it is there, and the rest from a text that is shipped.

    What was learnt is of one kind, and a few rows of it tell; the rest of the language needs more.

    Args:
        base: The training base.
        given: A file to take in the place of the training data; None to look for that.
        data: Files of training data; those that are None or not there are left out.
        rows: Of all texts together.
        own: How many of them from the training data; None for a quarter.
        general: The text that is shipped.
        taken: How many rows of each text to leave out (`rows_taken` of what an earlier call gave).

    Raises:
        DataError: The file that is given cannot be read.
    """

    def load(name: str, file: Path, count: int) -> Text:
        return load_text(name, file, base, count, taken.get(hash_file(file), 0) if taken else 0)

    own = max(rows // 4, 1) if own is None else own
    if given is not None:
        return [load("task", given, own), load("general", general, max(rows - own, 1))]
    files = list(dict.fromkeys(Path(file) for file in data if file is not None and Path(file).is_file()))
    texts = []
    for file in files:
        try:
            texts.append(load("task", file, max(own // len(files), 1)))
        except (DataError, CheckpointError):  # it has changed since, or was read without the chat template
            continue
    return [*texts, load("general", general, max(rows - own, 1) if texts else rows)]


def rows_taken(texts: Sequence[Text]) -> dict[str, int]:
    """How many rows of each text of the user's were taken, by the file's SHA-256."""
    return {hash_file(Path(text.source)): len(text) for text in texts if text.name == "task" and text.source}


def _tokenizer(base: TrainingBase) -> PreTrainedTokenizerBase | None:
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(base.directory)
        known = bool(tokenizer("A word.")["input_ids"])
    except Exception:  # what transformers raises for a missing or a damaged tokenizer has no common base
        return None
    return tokenizer if known and tokenizer.eos_token_id is not None else None


def _random_text(name: str, base: TrainingBase, rows: int, seed: int) -> Text:
    """For bases without a tokenizer."""
    length = min(64, base.config.max_position_embeddings)
    ids = torch.randint(0, base.config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed))
    return Text(name, "", ids, ids.clone(), torch.ones_like(ids))


def _spread(count: int, wanted: int) -> list[int]:
    if wanted >= count:
        return list(range(count))
    return [int(number * count / wanted) for number in range(wanted)]


def _pad(name: str, source: str, rows: list[torch.Tensor], labels: list[torch.Tensor]) -> Text:
    def pad(values: list[torch.Tensor], fill: int) -> torch.Tensor:
        return torch.nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=fill)

    mask = pad([torch.ones_like(row) for row in rows], 0)
    return Text(name, source, pad(rows, 0), pad(labels, IGNORED), mask)
