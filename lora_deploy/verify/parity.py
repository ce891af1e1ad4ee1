"""The exported model in onnxruntime against the dequantized twin, on padded batches, with and without a cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel

from lora_deploy.adapter import LoraAdapter
from lora_deploy.errors import InputError
from lora_deploy.quantization.base import TrainingBase
from lora_deploy.requantize.text import Text
from lora_deploy.run.session import Weights
from lora_deploy.task import is_classification
from lora_deploy.verify.batches import Batch, make_batches
from lora_deploy.verify.cases import MixedBatch, compare_all
from lora_deploy.verify.codes import check_adapter_codes, check_codes
from lora_deploy.verify.conclude import conclude
from lora_deploy.verify.deployed import DeployedWeights, load_deployed_twin, take_update_out
from lora_deploy.verify.deployment import DeploymentResult, held_out_texts, measure_deployment
from lora_deploy.verify.layers import Ran, errors_by_layer, run_batches
from lora_deploy.verify.metrics import compare_logits
from lora_deploy.verify.reference import (
    apply_live,
    load_live_model,
    load_twin,
    put_parameters,
)
from lora_deploy.verify.report import CaseResult, LayerErrors, Metrics, ParityReport, check_comparison
from lora_deploy.verify.sessions import Exported, open_sessions, run_export
from lora_deploy.verify.tolerances import TOLERANCES, Tolerance

__all__ = ["check_parity", "run_export", "run_twin"]


def check_parity(
    directory: str | Path,
    base: TrainingBase,
    adapters: Mapping[str, LoraAdapter],
    *,
    provider: str = "cpu",
    weights: Weights = "stored",
    data: Path | None = None,
    training_data: Sequence[str | None] = (),
    max_kl: float | None = None,
    on_progress: Callable[[str, int, int], None] = lambda task, done, total: None,
) -> ParityReport:
    """Compare an export with the twin of the same weights, and these weights, where they differ, with the trained ones.

    Args:
        directory: The export.
        base: The training base.
        adapters: The adapters to compare with, by name; none for an export of the base alone.
        provider: The provider it was made for. Where onnxruntime does not have it, the check runs on the CPU and the
            report says so.
        weights: How weights that are kept as codes run, as `OnnxSession` takes it.
        data: JSONL text to compare deployed with trained weights on; None to look for the training data.
        training_data: Where that was.
        max_kl: By how much they may differ on any text, in nats a token; None for any amount.
        on_progress: Is told the task, how much is done and of how much.

    Returns:
        The report. It passes if every case is within the tolerance and, for each adapter, the export without its
        update is not; and if `max_kl` is kept.

    Raises:
        ParityError: The codes in the export are not the base's, or not the adapter's, or not those that were made.
        UsageError: `max_kl` is negative.
        DataError: `data` cannot be read.
    """
    directory = Path(directory)
    check_comparison(data, max_kl)
    if base.task == "seq2seq-lm":
        from lora_deploy.verify.seq2seq import check_seq2seq_parity

        return check_seq2seq_parity(
            directory, base, adapters, provider=provider, max_kl=max_kl, on_progress=on_progress
        )
    codes = check_codes(directory, base)
    check_adapter_codes(directory, adapters)
    deployed = DeployedWeights(directory)
    texts = held_out_texts(directory, base, data, training_data) if deployed.differs else []
    references = _References(deployed, base, adapters, texts)
    on_progress("verifying", 0, len(adapters) + 1)
    with open_sessions(directory, provider, weights) as sessions:
        tolerance = TOLERANCES[sessions.row]
        exported = Exported(sessions, directory, references.batches)
        results, layers = _run_cases(references, exported, tolerance, on_progress)
    return conclude(
        results,
        tolerance,
        [*sessions.notes, *references.notes()],
        precision=sessions.row,
        provider=sessions.gated.provider,
        codes=codes,
        activation_rounding=exported.activation_rounding,
        deployment=references.deployment,
        max_kl=max_kl,
        layers=layers,
        bitsandbytes_gap=_bitsandbytes_gap(base, next(iter(adapters.values()), None), references.batches[0]),
    )


def _run_cases(
    references: _References, exported: Exported, tolerance: Tolerance, on_progress: Callable[[str, int, int], None]
) -> tuple[list[CaseResult], list[LayerErrors]]:
    """The export bare, where it can be run so, with each adapter, and with several at once."""
    adapters, batches, branch = references.adapters, references.batches, references.manifest.branch
    results: list[CaseResult] = []
    layers: list[LayerErrors] = []

    def compare(label: str, trained: Ran, found: Ran, without: Ran | None) -> None:
        control = None if without is None else without.logits
        results.extend(compare_all(label, batches, trained.logits, found.logits, control, tolerance))
        errors = errors_by_layer(trained.layers, found.layers)
        if errors is not None:
            others = None if without is None else errors_by_layer(trained.layers, without.layers)
            layers.append(LayerErrors(adapter=label, export=errors, control=others))

    alone = None if references.weights.is_merged and adapters else references.run_bare()
    mixed = MixedBatch(batches, list(adapters)) if branch == "pooled" else None
    if alone is not None and (branch in ("hot-swap", "pooled") or not adapters):
        label = "no adapter" if branch else ""
        compare(label, alone, exported.run(None), None)
    if mixed and alone is not None:
        mixed.keep(None, alone.logits)
    on_progress("verifying", 1, len(adapters) + 1)
    for number, name in enumerate(adapters):
        trained, control = references.run_adapter(name)
        built_in = branch in (None, "fixed")
        found = exported.run(None if built_in else name)
        compare("" if built_in else name, trained, found, alone if control is None else control)
        if mixed:
            mixed.keep(name, trained.logits)
        on_progress("verifying", number + 2, len(adapters) + 1)
    return results + (mixed.compare(exported, tolerance) if mixed else []), layers


class _References:
    """What the export is compared with, and, on the way, the deployed weights with the trained ones.

    Attributes:
        batches: What is run.
        deployment: What was found of the deployed weights, with the first adapter; None where they are the same.
    """

    def __init__(
        self, weights: DeployedWeights, base: TrainingBase, adapters: Mapping[str, LoraAdapter], texts: Sequence[Text]
    ) -> None:
        self.weights, self.base, self.adapters, self.texts = weights, base, adapters, texts
        self.manifest = weights.manifest
        self.batches = make_batches(base)
        self.deployment: DeploymentResult | None = None

    def run_bare(self) -> Ran:
        """The twin without an adapter."""
        twin = load_deployed_twin(self.weights, self.base, None)
        put_parameters(twin, _trained_head(self.base, self.adapters))
        if not self.adapters:
            self._measure(twin, None)
        return run_batches(twin, self.batches)

    def run_adapter(self, name: str) -> tuple[Ran, Ran | None]:
        """The twin with an adapter; and without its update, where that is inside of the weights."""
        adapter = self.adapters[name]
        twin = load_deployed_twin(self.weights, self.base, adapter)
        ran = run_batches(twin, self.batches)
        self._measure(twin, name)
        if not self.weights.is_merged:
            return ran, None
        take_update_out(twin, self.base, adapter)
        return ran, run_batches(twin, self.batches)

    def _measure(self, twin: PreTrainedModel, name: str | None) -> None:
        if self.deployment is not None or not self.weights.differs:
            return
        adapter = None if name is None else self.adapters[name]
        self.deployment = measure_deployment(self.weights, self.base, adapter, self.texts, deployed=twin)
        if name is not None and self.manifest.branch == "hot-swap":
            self.deployment.adapter = name

    def notes(self) -> list[str]:
        """What the reference is."""
        found = []
        if any(slot.int8_blocks is not None for slot in self.manifest.slots):
            found.append("the reference runs the adapter as it is stored: A and B rounded to int8")
        if self.deployment is not None and len(self.adapters) > 1:
            found.append(f"the deployed weights were measured with {next(iter(self.adapters))} only")
        return found


def _trained_head(base: TrainingBase, adapters: Mapping[str, LoraAdapter]) -> Mapping[str, torch.Tensor]:
    """What the control of a classifier has of its adapter: the base may have no head, and another head proves nothing.

    What it lacks is the low-rank update. Only an adapter that is alone in its export holds parameters whole.
    """
    is_classifier = is_classification(base.task)
    return next(iter(adapters.values())).parameters if is_classifier and adapters else {}


def run_twin(base: TrainingBase, adapter: LoraAdapter | None, batches: Sequence[Batch]) -> list[torch.Tensor]:
    """The trained function's logits of each batch: the twin with the adapter as a live branch."""
    twin = load_twin(base)
    if adapter is not None:
        apply_live(twin, adapter)
    return run_batches(twin, batches).logits


def _bitsandbytes_gap(base: TrainingBase, adapter: LoraAdapter | None, batch: Batch) -> Metrics | None:
    """How far bitsandbytes' own forward is from the twin; None where it quantizes no activations."""
    if base.scheme.method != "int8":
        return None
    try:
        live = load_live_model(base, adapter)
    except InputError:  # an adapter that trains a quantized layer whole, which bitsandbytes' layers cannot hold
        return None
    reference = run_twin(base, adapter, [batch])[0]
    return compare_logits(reference, run_batches(live, [batch]).logits[0], batch.attention_mask, 0.0)
