"""What is measured of an export: its speed as it decodes, and its distance from what was trained."""

from __future__ import annotations

import hashlib
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from lora_deploy.errors import OutputError
from lora_deploy.quantization.base import TrainingBase
from lora_deploy.requantize import Requantization
from lora_deploy.requantize.text import HELD_OUT, Text, pick_text, rows_taken
from lora_deploy.run.session import OnnxSession
from lora_deploy.verify.reference import compute_logits
from lora_deploy.verify.texts import Logits

__all__ = ["KeptLogits", "Speed", "choose_texts", "logits_of", "measure_speed"]

_ROWS = 16  # of each text
_PROMPT, _BURST, _BURSTS = 64, 8, 9


class KeptLogits:
    """The trained function's logits, computed once and kept in files: they are large, and the same for all candidates.

    Args:
        model: The trained twin.
        directory: Where the files go.
    """

    def __init__(self, model: PreTrainedModel, directory: Path) -> None:
        self._model: PreTrainedModel | None = model
        self._directory = directory

    def release(self) -> None:
        """Let go of the model: from now on there are only the batches that were asked for before."""
        self._model = None

    def __call__(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Logits of a batch, as `compute_logits` gives them; raises OutputError."""
        key = hashlib.sha256(input_ids.numpy().tobytes() + attention_mask.numpy().tobytes()).hexdigest()
        file = self._directory / f"logits-{key[:16]}.npy"
        if not file.is_file():
            assert self._model is not None
            try:
                np.save(file, compute_logits(self._model, input_ids, attention_mask).numpy())
            except OSError as error:
                raise OutputError(
                    "the trained model's logits could not be kept", file=file, found=error.strerror or str(error)
                ) from error
        return torch.from_numpy(np.load(file))


def choose_texts(
    base: TrainingBase, data: Path | None, calibration: Path | None, training_data: Sequence[str | None]
) -> list[Text]:
    """A text of the task, if there is one, and a general one, without the rows that rounding is calibrated on.

    Args:
        base: The training base.
        data: JSONL text of the task; None for the training data, where it is known.
        calibration: What merged weights are rounded for; None for the training data too.
        training_data: The files that training recorded.

    Raises:
        DataError: `data` or `calibration` cannot be read.
    """
    taken = rows_taken(pick_text(base, calibration, training_data, Requantization(4).rows))
    texts = pick_text(base, data, training_data, 4 * _ROWS, general=HELD_OUT, taken=taken)
    return [_thin(text) for text in texts]


def _thin(text: Text) -> Text:
    """Some rows, evenly from all of it."""
    step = max(len(text) // _ROWS, 1)
    return replace(
        text,
        input_ids=text.input_ids[::step],
        labels=text.labels[::step],
        attention_mask=text.attention_mask[::step],
    )


def logits_of(session: OnnxSession) -> Logits:
    """What an open export computes of a batch."""

    def logits(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(session.forward(input_ids.numpy(), attention_mask.numpy())[0])

    return logits


@dataclass(frozen=True)
class Speed:
    """How fast an export decodes one row.

    Attributes:
        tokens_per_second: The median of its bursts; it says little where the machine did other work.
        relative: To the yardstick, the median of the ratios of bursts beside each other.
    """

    tokens_per_second: float
    relative: float


def measure_speed(session: OnnxSession, yardstick: OnnxSession, vocabulary: int, positions: int) -> Speed:
    """Bursts of tokens of an export and of another one in turns, each burst after the same prompt.

    Args:
        session: The open export.
        yardstick: The one that it is compared with; may be the same.
        vocabulary: How many tokens there are.
        positions: How many the model can tell apart; the prompt is shorter where that is little.
    """
    prompt = min(_PROMPT, positions - 1)
    ids = (np.arange(10, 10 + prompt, dtype=np.int64) % vocabulary)[None]
    one, mask = ids[:, :1], np.ones((1, prompt + 1), np.int64)

    def burst(of: OnnxSession, cache: Any) -> float:
        of.forward(one, mask, cache)  # wakes its threads and its caches
        start = time.perf_counter()
        for _ in range(_BURST):
            of.forward(one, mask, cache)
        return (time.perf_counter() - start) / _BURST

    caches = [of.forward(ids, np.ones_like(ids), of.empty_cache(1, prompt + 1))[1] for of in (session, yardstick)]
    seconds, ratios = [], []
    for _ in range(_BURSTS):
        own, other = burst(session, caches[0]), burst(yardstick, caches[1])
        seconds.append(own)
        ratios.append(other / own)
    return Speed(1 / statistics.median(seconds), 1.0 if session is yardstick else statistics.median(ratios))
