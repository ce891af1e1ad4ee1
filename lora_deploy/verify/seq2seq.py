"""The graphs of an encoder-decoder against the dequantized twin: what the encoder gives, prefill, cached decode."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from transformers import PreTrainedModel

from lora_deploy.adapter import LoraAdapter
from lora_deploy.export.seq2seq import DECODER, ENCODER, WITH_PAST
from lora_deploy.manifest import Manifest
from lora_deploy.quantization.base import TrainingBase
from lora_deploy.run.adapters import Adapters
from lora_deploy.run.session import OnnxSession, import_onnxruntime
from lora_deploy.verify.batches import make_batches
from lora_deploy.verify.codes import check_adapter_codes, check_codes
from lora_deploy.verify.conclude import conclude
from lora_deploy.verify.metrics import compare_logits, is_within
from lora_deploy.verify.reference import apply_live, load_twin, put_parameters
from lora_deploy.verify.report import CaseResult, ParityReport
from lora_deploy.verify.tolerances import TOLERANCES, Tolerance

__all__ = ["check_seq2seq_parity", "open_parts", "run_parts"]

_ANSWER, _PREFILLED = 9, 4


@dataclass(frozen=True)
class _Batch:
    """Texts to read, padded, and the answers to decode, all of one length: int64 (batch, length)."""

    name: str
    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    decoder_ids: torch.Tensor


@dataclass(frozen=True)
class _Found:
    """What was computed: the encoder's output (batch, length, width), and logits (batch, answer, vocabulary)."""

    hidden: torch.Tensor
    logits: torch.Tensor

    def part(self, name: str) -> torch.Tensor:
        """What is compared as "encoder", "prefill" or "decode"."""
        if name == "encoder":
            return self.hidden
        return self.logits[:, :_PREFILLED] if name == "prefill" else self.logits[:, _PREFILLED:]


def check_seq2seq_parity(
    directory: Path,
    base: TrainingBase,
    adapters: Mapping[str, LoraAdapter],
    *,
    provider: str,
    max_kl: float | None,
    on_progress: Callable[[str, int, int], None],
) -> ParityReport:
    """Compare an encoder-decoder's export with the twin; arguments, result and errors are those of `check_parity`."""
    codes = check_codes(directory, base)
    check_adapter_codes(directory, adapters)
    manifest = Manifest.load(directory)
    available = "CUDAExecutionProvider" in import_onnxruntime().get_available_providers()
    usable: Literal["cpu", "cuda"] = "cuda" if provider == "cuda" and available else "cpu"
    notes = [] if usable == provider else [f"onnxruntime has no {provider} provider here: checked on the CPU"]
    tolerance = TOLERANCES[manifest.compute_dtype]
    parts = open_parts(directory, usable)
    batches = _make_batches(base)
    on_progress("verifying", 0, len(adapters) + 1)
    results: list[CaseResult] = []
    built_in = manifest.branch in (None, "fixed")
    alone = _run_twins(_twin(base, None), batches)
    if not built_in or not adapters:
        found = [run_parts(parts, directory, None, batch) for batch in batches]
        label = "no adapter" if manifest.branch else ""
        results += _compare(label, batches, alone, found, None, True, tolerance)
    for number, (name, adapter) in enumerate(adapters.items()):
        on_progress("verifying", number + 1, len(adapters) + 1)
        trained = _run_twins(_twin(base, adapter), batches)
        found = [run_parts(parts, directory, None if built_in else name, batch) for batch in batches]
        changed = (*adapter.updates, *adapter.parameters)
        in_encoder = any(not layer.startswith(("decoder.", "lm_head")) for layer in changed)
        results += _compare("" if built_in else name, batches, trained, found, alone, in_encoder, tolerance)
    on_progress("verifying", len(adapters) + 1, len(adapters) + 1)
    return conclude(
        results,
        tolerance,
        notes,
        precision=manifest.compute_dtype,
        provider=usable,
        codes=codes,
        max_kl=max_kl,
    )


def open_parts(directory: Path, provider: Literal["cpu", "cuda"] = "cpu") -> dict[str, OnnxSession]:
    """A session for each graph, by the name of its file."""
    return {name: OnnxSession(directory / name, provider) for name in (ENCODER, DECODER, WITH_PAST)}


def run_parts(parts: Mapping[str, OnnxSession], directory: Path, adapter: str | None, batch: Any) -> _Found:
    """Read a batch, take in the first tokens of its answers at once and the rest one by one.

    Args:
        parts: From `open_parts`.
        directory: The export.
        adapter: Name of the adapter; None for none.
        batch: Has `input_ids`, `attention_mask` and `decoder_ids`.
    """
    given = Adapters(parts[ENCODER], directory).inputs(adapter)

    def run(name: str, inputs: Mapping[str, Any]) -> dict[str, Any]:
        session = parts[name]
        return session.run(inputs, {key: value for key, value in given.items() if key in session.optional_inputs})

    mask, ids = batch.attention_mask.numpy(), batch.decoder_ids.numpy()
    hidden = run(ENCODER, {"input_ids": batch.input_ids.numpy(), "attention_mask": mask})["last_hidden_state"]
    outputs = run(
        DECODER,
        {"encoder_attention_mask": mask, "input_ids": ids[:, :_PREFILLED], "encoder_hidden_states": hidden},
    )
    logits = [outputs.pop("logits")]
    cache = {name.replace("present", "past_key_values", 1): value for name, value in outputs.items()}
    for position in range(_PREFILLED, ids.shape[1]):
        step = {"encoder_attention_mask": mask, "input_ids": ids[:, position : position + 1], **cache}
        outputs = run(WITH_PAST, step)
        logits.append(outputs.pop("logits"))
        cache |= {name.replace("present", "past_key_values", 1): value for name, value in outputs.items()}
    as_floats = [np.concatenate(logits, axis=1).astype(np.float32), hidden.astype(np.float32)]
    return _Found(torch.from_numpy(as_floats[1]), torch.from_numpy(as_floats[0]))


def _make_batches(base: TrainingBase) -> list[_Batch]:
    """Those of every check, to be read, each with answers."""
    generator = torch.Generator().manual_seed(2)
    batches = []
    for batch in make_batches(base):
        answers = torch.randint(0, base.config.vocab_size, (len(batch.input_ids), _ANSWER), generator=generator)
        batches.append(_Batch(batch.name, batch.input_ids, batch.attention_mask, answers))
    return batches


def _twin(base: TrainingBase, adapter: LoraAdapter | None) -> PreTrainedModel:
    twin = load_twin(base)
    if adapter is None:
        return twin
    if adapter.updates or adapter.tables:
        return apply_live(twin, adapter)
    put_parameters(twin, adapter.parameters)
    return twin


@torch.inference_mode()
def _run_twins(twin: PreTrainedModel, batches: list[_Batch]) -> list[_Found]:
    """Without any cache: every answer at once."""
    found = []
    for batch in batches:
        output = twin(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            decoder_input_ids=batch.decoder_ids,
            use_cache=False,
        )
        found.append(_Found(output.encoder_last_hidden_state.float(), output.logits.float()))
    return found


def _compare(
    label: str,
    batches: list[_Batch],
    trained: list[_Found],
    exported: list[_Found],
    alone: list[_Found] | None,
    in_encoder: bool,
    tolerance: Tolerance,
) -> list[CaseResult]:
    """Three cases a batch. The encoder's has no control where the adapter changes nothing of the encoder."""
    results = []
    for number, batch in enumerate(batches):
        everything = torch.ones_like(batch.decoder_ids)
        for name, masks in (
            ("encoder", batch.attention_mask),
            ("prefill", everything[:, :_PREFILLED]),
            ("decode", everything[:, _PREFILLED:]),
        ):
            found = exported[number].part(name)
            export = compare_logits(trained[number].part(name), found, masks, tolerance.tie_margin)
            control = None
            if alone is not None and (in_encoder or name != "encoder"):
                control = compare_logits(alone[number].part(name), found, masks, tolerance.tie_margin)
            results.append(
                CaseResult(
                    adapter=label,
                    name=f"{name}, {batch.name}",
                    export=export,
                    control=control,
                    passed=is_within(export, tolerance),
                    control_passed=is_within(control, tolerance),
                )
            )
    return results
