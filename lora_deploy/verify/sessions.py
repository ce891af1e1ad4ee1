"""The export in onnxruntime, as it is and without the rounding of activations, run on the batches of the check."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from lora_deploy.manifest import Manifest
from lora_deploy.run.adapters import Adapters
from lora_deploy.run.session import Cache, OnnxSession, Weights, import_onnxruntime
from lora_deploy.task import is_classification
from lora_deploy.verify.batches import Batch
from lora_deploy.verify.layers import Ran, layers_of
from lora_deploy.verify.metrics import compare_logits, worst_of
from lora_deploy.verify.report import Metrics
from lora_deploy.verify.shadow import write_float32_shadow

__all__ = ["Exported", "Sessions", "open_sessions", "run_export"]


@dataclass(frozen=True)
class Sessions:
    """What an export is run by.

    Attributes:
        gated: Computes on the activations as they are.
        deployed: The export as it is, where that rounds activations to int8; else None.
        row: Of the table of tolerances.
        notes: What limits the check.
    """

    gated: OnnxSession
    deployed: OnnxSession | None
    row: str
    notes: list[str] = field(default_factory=list)


@contextmanager
def open_sessions(directory: Path, provider: str, weights: Weights) -> Iterator[Sessions]:
    """Open an export to check it.

    Where this machine cannot run bfloat16, the sessions are on a float32 shadow.

    Args:
        directory: The export.
        provider: What it was made for.
        weights: How weights that are kept as codes run.
    """
    available = "CUDAExecutionProvider" in import_onnxruntime().get_available_providers()
    usable: Literal["cpu", "cuda"] = "cuda" if provider == "cuda" and available else "cpu"
    notes = [] if usable == provider else [f"onnxruntime has no {provider} provider here: checked on the CPU"]
    manifest = Manifest.load(directory)
    row: str = manifest.compute_dtype
    with tempfile.TemporaryDirectory() as shadow:
        if row == "bf16" and usable == "cpu":
            notes.append("checked with the bfloat16 weights in float32 arithmetic; run `lora-deploy verify` on a GPU")
            row = "bf16 weights"
            write_float32_shadow(directory, Path(shadow))
            directory, weights = Path(shadow), "stored"
        rounds = weights == "stored" and any(weight.accuracy_level == 4 for weight in manifest.coded)
        gated = OnnxSession(directory, usable, weights, exact_activations=rounds)
        yield Sessions(gated, OnnxSession(directory, usable) if rounds else None, row, notes)


class Exported:
    """The export, run on every batch with one adapter or another.

    Args:
        sessions: What runs it.
        directory: The export.
        batches: What it is run on.

    Attributes:
        activation_rounding: How far the export as it is was from the gated session at worst; None where it is the same.
    """

    def __init__(self, sessions: Sessions, directory: Path, batches: Sequence[Batch]) -> None:
        self.sessions, self.batches = sessions, batches
        self.adapters = Adapters(sessions.gated, directory)
        self.activation_rounding: Metrics | None = None

    def run(self, adapter: str | None) -> Ran:
        """Every batch, with one adapter for all rows."""
        inputs = self.adapters.inputs(adapter)
        logits, layers = [], None
        for batch in self.batches:
            found, cache = self._run(batch, inputs)
            logits.append(found)
            layers = layers_of(batch, cache) or layers
        return Ran(logits, layers)

    def run_rows(self, batch: Batch, adapters: Sequence[str | None]) -> torch.Tensor:
        """Logits of one batch, with an adapter for each row."""
        return self._run(batch, self.adapters.row_inputs(adapters))[0]

    def _run(self, batch: Batch, inputs: Mapping[str, Any]) -> tuple[torch.Tensor, Cache]:
        logits, cache = _run_with_cache(self.sessions.gated, batch, inputs)
        if self.sessions.deployed is not None:
            rounded = run_export(self.sessions.deployed, batch, inputs)
            for _, tokens, mask in batch.phases():
                found = compare_logits(logits[:, tokens], rounded[:, tokens], mask, tie_margin=0.0)
                self.activation_rounding = worst_of([found, self.activation_rounding])
        return logits, cache


def run_export(session: OnnxSession, batch: Batch, adapter: Mapping[str, Any]) -> torch.Tensor:
    """Logits of the whole batch, the last tokens one by one through the cache."""
    return _run_with_cache(session, batch, adapter)[0]


def _run_with_cache(session: OnnxSession, batch: Batch, adapter: Mapping[str, Any]) -> tuple[torch.Tensor, Cache]:
    """As `run_export`, and the cache at the end, which a classifier has not."""
    ids, mask = batch.input_ids.numpy(), batch.attention_mask.numpy()
    if is_classification(batch.task):
        classes = torch.from_numpy(session.forward(ids, mask, adapter=adapter)[0])
        return classes if classes.ndim == 3 else classes[:, None], {}
    first = batch.prefilled
    logits, cache = session.forward(ids[:, :first], mask[:, :first], adapter=adapter)
    parts = [logits]
    for end in range(first + 1, ids.shape[1] + 1):
        logits, cache = session.forward(ids[:, end - 1 : end], mask[:, :end], cache, adapter)
        parts.append(logits)
    return torch.from_numpy(np.concatenate(parts, axis=1)), cache
