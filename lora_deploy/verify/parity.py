"""The exported model in onnxruntime against the dequantized twin, on padded batches, with and without a cache."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from transformers import PreTrainedModel

from lora_deploy.adapter import LoraAdapter, apply_adapter
from lora_deploy.adapter.packing import deployed_adapter
from lora_deploy.errors import InputError
from lora_deploy.manifest import Manifest
from lora_deploy.quantization.base import TrainingBase
from lora_deploy.run.adapters import Adapters
from lora_deploy.run.session import OnnxSession, Weights, import_onnxruntime
from lora_deploy.verify.batches import Batch, make_batches
from lora_deploy.verify.codes import check_adapter_codes, check_codes
from lora_deploy.verify.metrics import compare_logits, is_within
from lora_deploy.verify.reference import (
    compute_class_logits,
    compute_logits,
    load_live_model,
    load_twin,
    put_parameters,
)
from lora_deploy.verify.report import CaseResult, Metrics, ParityReport
from lora_deploy.verify.shadow import write_float32_shadow
from lora_deploy.verify.tolerances import TOLERANCES, Tolerance

__all__ = ["check_parity", "run_export", "run_twin"]

_CLEAR_EFFECT = 10  # times the tolerance
_TINY = 1e-30


def check_parity(
    directory: str | Path,
    base: TrainingBase,
    adapters: Mapping[str, LoraAdapter],
    *,
    provider: str = "cpu",
    weights: Weights = "stored",
    on_progress: Callable[[str, int, int], None] = lambda task, done, total: None,
) -> ParityReport:
    """Compare an export with the function that was trained, with A and B rounded where the export rounds them to int8.

    Args:
        directory: The export.
        base: The training base.
        adapters: The adapters to compare with, by name; none for an export of the base alone.
        provider: The provider it was made for. Where onnxruntime does not have it, the check runs on the CPU and the
            report says so.
        weights: How weights that are kept as codes run, as `OnnxSession` takes it.
        on_progress: Is told the task, how much is done and of how much.

    Returns:
        The report. It passes if every case is within the tolerance and, for each adapter, the base alone is not.

    Raises:
        ParityError: The codes in the export are not the base's, or not the adapter's.
    """
    directory = Path(directory)
    codes = check_codes(directory, base)
    check_adapter_codes(directory, adapters)
    batches = make_batches(base)
    steps = len(adapters) + 1
    on_progress("verifying", 0, steps)
    alone = run_twin(base, None, batches, _trained_head(base, adapters))
    with _open_session(directory, provider, weights) as (session, row, notes):
        manifest = session.manifest
        assert manifest is not None
        tolerance = TOLERANCES[row]
        exported = _Exported(session, directory, batches)
        mixed = _MixedBatch(batches, list(adapters)) if manifest.branch == "pooled" else None
        results: list[CaseResult] = []
        if any(slot.int8_blocks is not None for slot in manifest.slots):
            notes.append("the reference runs the adapter as it is stored: A and B rounded to int8")
        if manifest.branch in ("hot-swap", "pooled") or not adapters:
            label = "no adapter" if manifest.branch else ""
            results += _compare_all(label, batches, alone, exported.run(None), None, tolerance)
        if mixed:
            mixed.keep(None, alone)
        on_progress("verifying", 1, steps)
        for number, (name, adapter) in enumerate(adapters.items()):
            trained = run_twin(base, deployed_adapter(adapter, manifest.slots), batches)
            built_in = manifest.branch in (None, "fixed")
            label = "" if built_in else name
            found = exported.run(None if built_in else name)
            results += _compare_all(label, batches, trained, found, alone, tolerance)
            if mixed:
                mixed.keep(name, trained)
            on_progress("verifying", number + 2, steps)
        if mixed:
            results += mixed.compare(exported, tolerance)
    gap = _bitsandbytes_gap(base, next(iter(adapters.values()), None), batches[0])
    controls = [not result.control_passed for result in results if result.control is not None]
    notes += _weak_effects(results, tolerance)
    control_failed = all(controls) if controls else None
    return ParityReport(
        precision=row,
        provider=session.provider,
        tolerance=asdict(tolerance),
        cases=results,
        control_failed=control_failed,
        passed=all(result.passed for result in results) and control_failed is not False,
        codes=codes,
        bitsandbytes_gap=gap,
        notes=notes,
        versions=_versions(),
    )


def _weak_effects(results: Sequence[CaseResult], tolerance: Tolerance) -> list[str]:
    """A note for each adapter whose effect is less than ten times what the gate forgives."""
    effects: dict[str, float] = {}
    for result in results:
        if result.control is not None:
            effect = result.control.mean_kl / max(tolerance.kl, _TINY)
            if tolerance.max_abs is not None:
                effect = max(effect, result.control.max_abs / max(tolerance.max_abs, _TINY))
            effects[result.adapter] = min(effect, effects.get(result.adapter, effect))
    return [
        f"the effect of {name or 'the adapter'} is only {effect:.1f} times the tolerance: a small part of it could be "
        "lost without notice"
        for name, effect in effects.items()
        if 1 < effect < _CLEAR_EFFECT
    ]


def _trained_head(base: TrainingBase, adapters: Mapping[str, LoraAdapter]) -> Mapping[str, torch.Tensor]:
    """What the control of a classifier has of its adapter: the base may have no head, and another head proves nothing.

    What it lacks is the low-rank update. Only an adapter that is alone in its export holds parameters whole.
    """
    is_classifier = base.task == "sequence-classification"
    return next(iter(adapters.values())).parameters if is_classifier and adapters else {}


def run_twin(
    base: TrainingBase,
    adapter: LoraAdapter | None,
    batches: Sequence[Batch],
    head: Mapping[str, torch.Tensor] | None = None,
) -> list[torch.Tensor]:
    """The reference's logits of each batch: the twin, with the adapter as a live branch, or with its head only."""
    twin = load_twin(base)
    put_parameters(twin, head or {})
    if adapter is not None:
        # `merge_weights` would merge the twin's branch, too.
        config = adapter.config.model_copy(update={"merge_weights": False})
        apply_adapter(twin, replace(adapter, config=config)).eval()
    return [_run_model(twin, batch) for batch in batches]


def _bitsandbytes_gap(base: TrainingBase, adapter: LoraAdapter | None, batch: Batch) -> Metrics | None:
    """How far bitsandbytes' own forward is from the twin; None where it quantizes no activations."""
    if base.scheme.method != "int8":
        return None
    try:
        live = load_live_model(base, adapter)
    except InputError:  # an adapter that trains a quantized layer whole, which bitsandbytes' layers cannot hold
        return None
    reference = run_twin(base, adapter, [batch])[0]
    return compare_logits(reference, _run_model(live, batch), batch.attention_mask, 0.0)


class _Exported:
    """The export, run on every batch with one adapter or another."""

    def __init__(self, session: OnnxSession, directory: Path, batches: Sequence[Batch]) -> None:
        self.session, self.batches = session, batches
        self.adapters = Adapters(session, directory)

    def run(self, adapter: str | None) -> list[torch.Tensor]:
        """Logits of each batch, with one adapter for all rows."""
        inputs = self.adapters.inputs(adapter)
        return [run_export(self.session, batch, inputs) for batch in self.batches]

    def run_rows(self, batch: Batch, adapters: Sequence[str | None]) -> torch.Tensor:
        """Logits of one batch, with an adapter for each row."""
        return run_export(self.session, batch, self.adapters.row_inputs(adapters))


class _MixedBatch:
    """Batches whose rows run with different adapters, every adapter and none among them."""

    def __init__(self, batches: Sequence[Batch], names: Sequence[str]) -> None:
        self.number, self.batch = next((n, batch) for n, batch in enumerate(batches) if batch.name == "left-padded")
        rows = self.batch.input_ids.shape[0]
        choices = [None, *names]
        choices += choices[: -len(choices) % rows]
        self.runs = [choices[start : start + rows] for start in range(0, len(choices), rows)]
        self.references: dict[str | None, torch.Tensor] = {}

    def keep(self, name: str | None, trained: list[torch.Tensor]) -> None:
        """Remember what each row is with this adapter."""
        self.references[name] = trained[self.number]

    def compare(self, exported: _Exported, tolerance: Tolerance) -> list[CaseResult]:
        """One case for each run; the control is the base alone in every row."""
        results = []
        for number, choices in enumerate(self.runs):
            trained = torch.stack([self.references[name][row] for row, name in enumerate(choices)])
            found = exported.run_rows(self.batch, choices)
            label = f"mixed {number + 1}"
            control = self.references[None] if any(choices) else None
            results += _compare_batch(label, self.batch, trained, found, control, tolerance)
        return results


def _compare_all(
    label: str,
    batches: Sequence[Batch],
    trained: Sequence[torch.Tensor],
    exported: Sequence[torch.Tensor],
    alone: Sequence[torch.Tensor] | None,
    tolerance: Tolerance,
) -> list[CaseResult]:
    results = []
    for number, batch in enumerate(batches):
        control = alone[number] if alone is not None and batch.tells_apart else None
        results += _compare_batch(label, batch, trained[number], exported[number], control, tolerance)
    return results


def _compare_batch(
    label: str,
    batch: Batch,
    trained: torch.Tensor,
    exported: torch.Tensor,
    alone: torch.Tensor | None,
    tolerance: Tolerance,
) -> list[CaseResult]:
    results = []
    for name, tokens, mask in batch.phases():
        export = compare_logits(trained[:, tokens], exported[:, tokens], mask, tolerance.tie_margin)
        control = None
        if alone is not None:
            control = compare_logits(alone[:, tokens], exported[:, tokens], mask, tolerance.tie_margin)
        results.append(
            CaseResult(
                adapter=label,
                name=name,
                export=export,
                control=control,
                passed=is_within(export, tolerance),
                control_passed=is_within(control, tolerance),
            )
        )
    return results


@contextmanager
def _open_session(directory: Path, provider: str, weights: Weights) -> Iterator[tuple[OnnxSession, str, list[str]]]:
    """A session on the export, the row of its tolerance and what limits the check.

    Where this machine cannot run bfloat16, the session is on a float32 shadow.
    """
    available = "CUDAExecutionProvider" in import_onnxruntime().get_available_providers()
    usable: Literal["cpu", "cuda"] = "cuda" if provider == "cuda" and available else "cpu"
    notes = [] if usable == provider else [f"onnxruntime has no {provider} provider here: checked on the CPU"]
    manifest = Manifest.load(directory)
    rows: list[str] = [manifest.compute_dtype]
    if any(weight.accuracy_level == 4 for weight in manifest.coded):
        rows.append("int8 activations")
    elif not all(weight.exact for weight in manifest.coded):
        rows.append("int8")
    if manifest.compute_dtype == "bf16" and usable == "cpu":
        notes.append("checked with the bfloat16 weights in float32 arithmetic; run `lora-deploy verify` on a GPU")
        rows[0] = "bf16 weights"
    row = max(rows, key=lambda name: TOLERANCES[name].kl)
    if "bf16 weights" in rows:
        with tempfile.TemporaryDirectory() as shadow:
            write_float32_shadow(directory, Path(shadow))
            yield OnnxSession(shadow, usable), row, notes
    else:
        yield OnnxSession(directory, usable, weights), row, notes


def _run_model(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    compute = compute_class_logits if batch.task == "sequence-classification" else compute_logits
    return compute(model, batch.input_ids, batch.attention_mask)


def run_export(session: OnnxSession, batch: Batch, adapter: Mapping[str, Any]) -> torch.Tensor:
    """Logits of the whole batch, the last tokens one by one through the cache."""
    ids, mask = batch.input_ids.numpy(), batch.attention_mask.numpy()
    if batch.task == "sequence-classification":
        return torch.from_numpy(session.forward(ids, mask, adapter=adapter)[0])[:, None]
    first = batch.prefilled
    logits, cache = session.forward(ids[:, :first], mask[:, :first], adapter=adapter)
    parts = [logits]
    for end in range(first + 1, ids.shape[1] + 1):
        logits, cache = session.forward(ids[:, end - 1 : end], mask[:, :end], cache, adapter)
        parts.append(logits)
    return torch.from_numpy(np.concatenate(parts, axis=1))


def _versions() -> dict[str, str]:
    found = {}
    for name in (
        "bitsandbytes",
        "lora-deploy",
        "mobius-onnx",
        "onnxruntime",
        "onnxruntime-gpu",
        "torch",
        "transformers",
    ):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
