"""Training data: JSONL read and checked, as tokenized examples, and the split for evaluation."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from lora_deploy.data.encode import encode
from lora_deploy.errors import DataError

__all__ = ["IGNORED", "Example", "Examples", "load_examples", "read_records", "split_examples"]

IGNORED = -100
"""Label of a token that is read but not learned; torch's cross entropy leaves it out."""

_FORMS = (frozenset({"prompt", "completion"}), frozenset({"messages"}), frozenset({"text"}))
_EXPECTED = '{"prompt": ..., "completion": ...}, {"messages": [...]} or {"text": ...}'


@dataclass(frozen=True, eq=False)
class Example:
    """One tokenized example.

    Attributes:
        input_ids: int32 (n,).
        labels: int32 (n,): the token itself where it is learned, IGNORED elsewhere. The first one always is IGNORED,
            for nothing comes before it to predict it from.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return self.input_ids.numel()


@dataclass
class Examples:
    """The examples of one file, and what was done to them.

    Attributes:
        kept: Those that can be trained on.
        cut: How many were longer than the limit and lost their end.
        dropped: How many had nothing left to learn.
    """

    kept: list[Example] = field(default_factory=list)
    cut: int = 0
    dropped: int = 0

    def warnings(self, file: Path, max_length: int) -> list[str]:
        """What the user should know, one sentence each."""
        found = []
        if self.cut:
            found.append(f"{file}: {self.cut} examples were longer than {max_length} tokens and lost their end")
        if self.dropped:
            found.append(f"{file}: {self.dropped} examples have no token to learn and were left out")
        return found


def read_records(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Read JSONL; blank lines are skipped.

    Yields:
        Line number from 1, and the record, of one of the three forms.

    Raises:
        DataError: The file is missing, not UTF-8, or a line is not JSON or of no known form.
    """
    try:
        with file.open("rb") as lines:
            for number, raw in enumerate(lines, 1):
                line = raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw
                if line.strip():
                    yield number, _check_record(file, number, _parse(file, number, line))
    except OSError as error:
        raise DataError(
            "the data file cannot be read", file=file, found=error.strerror, expected="a JSONL file"
        ) from error


def _parse(file: Path, number: int, line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(
            "a line of the data is not UTF-8",
            file=f"{file}, line {number}",
            found=str(error),
            remedy="save the file as UTF-8",
        ) from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(
            "a line of the data is not JSON",
            file=f"{file}, line {number}",
            found=f"{line[:80].decode('utf-8', 'replace').rstrip()!r} ({error})",
            expected=f"one JSON object on each line: {_EXPECTED}",
            remedy="write each record on one line, with json.dumps for example",
        ) from error


def _check_record(file: Path, number: int, record: Any) -> dict[str, Any]:
    if not isinstance(record, dict) or frozenset(record) not in _FORMS:
        found = f"the keys {', '.join(sorted(record))}" if isinstance(record, dict) else type(record).__name__
        raise DataError(
            "a record of the data has none of the three forms",
            file=f"{file}, line {number}",
            found=found if record else "an empty record",
            expected=_EXPECTED,
            remedy="rename the keys, and remove those that are not trained on",
        )
    for key, value in record.items():
        if key != "messages" and not isinstance(value, str):
            raise _wrong_value(file, number, key, value, "a string")
    if "messages" in record:
        _check_messages(file, number, record["messages"])
    return record


def _check_messages(file: Path, number: int, messages: Any) -> None:
    if not isinstance(messages, list) or not messages:
        raise _wrong_value(file, number, "messages", messages, 'a list of {"role": ..., "content": ...}')
    for index, message in enumerate(messages):
        for key in ("role", "content"):
            value = message.get(key) if isinstance(message, dict) else None
            if not isinstance(value, str):
                raise _wrong_value(file, number, f"messages[{index}].{key}", value, "a string")
    if not any(message["role"] == "assistant" for message in messages):
        roles = ", ".join(message["role"] for message in messages)
        raise _wrong_value(file, number, "messages", f"the roles {roles}", "at least one turn of the assistant")


def _wrong_value(file: Path, number: int, key: str, found: object, expected: str) -> DataError:
    return DataError(
        "a record of the data has a value of the wrong kind",
        file=f"{file}, line {number}",
        tensor=key,
        found=repr(found)[:200],
        expected=expected,
    )


def load_examples(
    file: Path, tokenizer: PreTrainedTokenizerBase, max_length: int, *, chat_template: bool = True
) -> Examples:
    """Read a JSONL file and tokenize it.

    prompt/completion: the loss is on the completion and the end token; with a chat template they are a user's and an
    assistant's message. messages: on every turn of the assistant, its end token included. text: on everything.

    Args:
        file: JSONL.
        tokenizer: The base's.
        max_length: Tokens that are kept of an example.
        chat_template: Whether prompt/completion go through the tokenizer's chat template, if it has one.

    Raises:
        DataError: A line is malformed, does not fit the chat template, or no example is left.
    """
    examples = Examples()
    for number, record in read_records(file):
        ids, learned = encode(f"{file}, line {number}", record, tokenizer, chat_template)
        examples.cut += len(ids) > max_length
        input_ids = torch.tensor(ids[:max_length], dtype=torch.int32)
        labels = torch.where(torch.tensor(learned[:max_length], dtype=torch.bool), input_ids, IGNORED)
        labels[:1] = IGNORED
        if bool((labels != IGNORED).any()):
            examples.kept.append(Example(input_ids, labels.to(torch.int32)))
        else:
            examples.dropped += 1
    if not examples.kept:
        raise DataError(
            "the data has no example to learn from",
            file=file,
            found=f"{examples.dropped} records, none with a token to learn in its first {max_length} tokens"
            if examples.dropped
            else "an empty file",
            remedy="raise --max-length, or shorten the prompts" if examples.dropped else None,
        )
    return examples


def split_examples(examples: list[Example], fraction: float, seed: int) -> tuple[list[Example], list[Example]]:
    """Keep a part of the examples for evaluation.

    Args:
        examples: All of them.
        fraction: The part; at least one example is kept when it is not zero.
        seed: Decides which.

    Returns:
        Training and evaluation examples, each in the order of the file.

    Raises:
        DataError: There are too few to split.
    """
    if not fraction:
        return examples, []
    count = max(1, round(len(examples) * fraction))
    if count >= len(examples):
        raise DataError(
            "there are too few examples to keep some for evaluation",
            found=f"{len(examples)} examples, of which {count} would be kept",
            remedy="lower --eval-fraction, or give --eval-data",
        )
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen = set(order[:count])
    kept = [example for index, example in enumerate(examples) if index in chosen]
    return [example for index, example in enumerate(examples) if index not in chosen], kept
