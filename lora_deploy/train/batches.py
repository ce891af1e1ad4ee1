"""Examples put together into batches: padded, or packed several to a row."""

from __future__ import annotations

import bisect
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset, Sampler

from lora_deploy.data.examples import IGNORED, Example
from lora_deploy.errors import UsageError

__all__ = ["EpochSampler", "Rows", "check_packing", "collate_packed", "collate_padded", "pack"]

Row = Sequence[Example]


class Rows(Dataset[Row]):
    """The rows of a training set, each with one example or several that were packed.

    Args:
        rows: The rows.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        return self.rows[index]


class EpochSampler(Sampler[int]):
    """A new order for each epoch, decided by the seed and the epoch's number alone.

    Torch's own sampler draws from the global generator, so that a resumed run would need its whole past.

    Args:
        count: How many rows there are.
        seed: Decides the orders.
        epoch: Gives the number of the epoch that begins.
    """

    def __init__(self, count: int, seed: int, epoch: Callable[[], int]) -> None:
        self.count, self.seed, self.epoch = count, seed, epoch

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + 1_000_003 * self.epoch())
        yield from torch.randperm(self.count, generator=generator).tolist()


def pack(examples: Sequence[Example], max_length: int) -> list[list[Example]]:
    """Put examples into rows: each into the fullest row that has room, the longest first ("best fit decreasing").

    Args:
        examples: None longer than `max_length`.
        max_length: Tokens of a row.
    """
    rows: list[list[Example]] = []
    room: list[tuple[int, int]] = []  # (free tokens, row), sorted
    for example in sorted(examples, key=len, reverse=True):
        at = bisect.bisect_left(room, (len(example), -1))
        if at == len(room):
            free, row = max_length, len(rows)
            rows.append([])
        else:
            free, row = room.pop(at)
        rows[row].append(example)
        bisect.insort(room, (free - len(example), row))
    return rows


def collate_padded(rows: Sequence[Row], pad_id: int) -> dict[str, Any]:
    """Pad rows of one example each on the right.

    Returns:
        `input_ids`, `attention_mask`, `labels`: int64 (batch, longest); `num_tokens`: int, padding apart.
    """
    examples = [example for row in rows for example in row]
    shape = (len(examples), max(len(example) for example in examples))
    input_ids = torch.full(shape, pad_id)
    attention_mask = torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, IGNORED)
    for index, example in enumerate(examples):
        input_ids[index, : len(example)] = example.input_ids
        attention_mask[index, : len(example)] = 1
        labels[index, : len(example)] = example.labels
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "labels": labels,
        "num_tokens": sum(len(example) for example in examples),
    }


def collate_packed(rows: Sequence[Row], pad_id: int) -> dict[str, Any]:
    """Lay the examples of each row end to end.

    There is no attention mask: transformers makes it block-diagonal where the positions start again. The padding at
    the end of a row is one more block of its own.

    Returns:
        `input_ids`, `position_ids`, `labels`: int64 (batch, longest); `num_tokens`: int, padding apart.
    """
    sizes = [sum(len(example) for example in row) for row in rows]
    shape = (len(rows), max(sizes))
    input_ids = torch.full(shape, pad_id)
    position_ids = torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, IGNORED)
    for index, row in enumerate(rows):
        at = 0
        for example in row:
            end = at + len(example)
            input_ids[index, at:end] = example.input_ids
            labels[index, at:end] = example.labels
            position_ids[index, at:end] = torch.arange(len(example))
            at = end
        position_ids[index, at:] = torch.arange(shape[1] - at)
    return {"input_ids": input_ids, "position_ids": position_ids, "labels": labels, "num_tokens": sum(sizes)}


@torch.no_grad()
def check_packing(model: nn.Module, device: torch.device) -> None:
    """Make sure that examples packed into one row do not see each other in this model.

    Two rows differ in their first example only; the logits of the second one must then be the same.

    Raises:
        UsageError: The model takes no positions, or attends across examples.
    """
    remedy = "leave --pack out"
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise UsageError("this model takes no position_ids, so examples cannot be packed", remedy=remedy)
    training = model.training
    first, second = torch.arange(8).view(2, 4), torch.arange(8, 12).expand(2, 4)
    positions = torch.arange(4).repeat(2).expand(2, 8)
    batch = torch.cat([first, second], dim=1).to(device)
    logits = model.eval()(input_ids=batch, position_ids=positions.to(device), use_cache=False).logits[:, 4:].float()
    model.train(training)
    if not torch.allclose(logits[0], logits[1], rtol=1e-3, atol=1e-5):
        raise UsageError(
            "this model attends from one packed example to another",
            found=f"logits that differ by {float((logits[0] - logits[1]).abs().max()):.2g}",
            expected="a block-diagonal attention mask wherever position_ids start again",
            remedy=remedy,
        )
