"""The exported model in onnxruntime against the dequantized twin, on padded batches, with and without a cache."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from transformers import AutoTokenizer, PreTrainedModel

from lora_deploy.adapter import LoraAdapter, apply_adapter
from lora_deploy.quantization.base import TrainingBase
from lora_deploy.run.session import OnnxSession, import_onnxruntime
from lora_deploy.verify.reference import compute_logits, load_live_model, load_twin
from lora_deploy.verify.report import CaseResult, Metrics, ParityReport
from lora_deploy.verify.shadow import write_float32_shadow
from lora_deploy.verify.tolerances import TOLERANCES, Tolerance

__all__ = ["Batch", "check_parity", "compare_logits", "is_within", "make_batches"]

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
    """

    name: str
    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    decoded: int

    @property
    def prefilled(self) -> int:
        """How many tokens go in at once."""
        return self.input_ids.shape[1] - self.decoded


def check_parity(
    directory: str | Path,
    base: TrainingBase,
    adapter: LoraAdapter | None,
    *,
    precision: str,
    provider: str = "cpu",
    on_progress: Callable[[str, int, int], None] = lambda task, done, total: None,
) -> ParityReport:
    """Compare an export with the function that was trained.

    Args:
        directory: The export.
        base: The training base.
        adapter: The adapter; None for an export of the base alone.
        precision: The export's "fp32", "fp16" or "bf16".
        provider: The provider it was made for. Where onnxruntime does not have it, the check runs on the CPU and the
            report says so.
        on_progress: Is told the task, how much is done and of how much.

    Returns:
        The report. It passes if every case is within the tolerance and, with an adapter, the base alone is not.
    """
    batches = make_batches(base)
    on_progress("verifying", 0, 3)
    twin = load_twin(base)
    alone = [_run_twin(twin, batch) for batch in batches] if adapter else []
    if adapter is not None:
        # `merge_weights` would merge the twin's branch, too.
        config = adapter.config.model_copy(update={"merge_weights": False})
        apply_adapter(twin, replace(adapter, config=config)).eval()
    trained = [_run_twin(twin, batch) for batch in batches]
    del twin
    on_progress("verifying", 1, 3)
    gap = None
    if base.scheme.method == "int8":
        live = load_live_model(base, adapter)
        gap = compare_logits(trained[0], _run_twin(live, batches[0]), batches[0].attention_mask, 0.0)
        del live
    row, notes = precision, []
    with _open_session(Path(directory), precision, provider) as (session, shadowed):
        if session.provider != provider:
            notes.append(f"onnxruntime has no {provider} provider here: checked on the CPU")
        if shadowed:
            row = "bf16 weights"
            notes.append("checked with the bfloat16 weights in float32 arithmetic; run `lora-deploy verify` on a GPU")
        exported = [_run_export(session, batch) for batch in batches]
    on_progress("verifying", 2, 3)
    tolerance = TOLERANCES[row]
    results = []
    for number, batch in enumerate(batches):
        control = alone[number] if alone else None
        results += _compare_batch(batch, trained[number], exported[number], control, tolerance)
    controls = [not is_within(result.control, tolerance) for result in results if result.control is not None]
    control_failed = all(controls) if controls else None
    on_progress("verifying", 3, 3)
    return ParityReport(
        precision=row,
        provider=session.provider,
        tolerance=asdict(tolerance),
        cases=results,
        control_failed=control_failed,
        passed=all(result.passed for result in results) and control_failed is not False,
        bitsandbytes_gap=gap,
        notes=notes,
        versions=_versions(),
    )


def _compare_batch(
    batch: Batch, trained: torch.Tensor, exported: torch.Tensor, alone: torch.Tensor | None, tolerance: Tolerance
) -> list[CaseResult]:
    """Prefill and decoding apart, so that the many tokens of the one do not hide the few of the other."""
    results = []
    for phase, tokens in (("prefill", slice(None, batch.prefilled)), ("decode", slice(batch.prefilled, None))):
        mask = batch.attention_mask[:, tokens]
        export = compare_logits(trained[:, tokens], exported[:, tokens], mask, tolerance.tie_margin)
        control = None
        if alone is not None:
            control = compare_logits(alone[:, tokens], exported[:, tokens], mask, tolerance.tie_margin)
        name = f"{phase}, {batch.name}"
        results.append(CaseResult(name=name, export=export, control=control, passed=is_within(export, tolerance)))
    return results


@contextmanager
def _open_session(directory: Path, precision: str, provider: str) -> Iterator[tuple[OnnxSession, bool]]:
    """A session on the export; on a float32 shadow of it where this machine cannot run bfloat16."""
    available = "CUDAExecutionProvider" in import_onnxruntime().get_available_providers()
    usable: Literal["cpu", "cuda"] = "cuda" if provider == "cuda" and available else "cpu"
    if precision == "bf16" and usable == "cpu":
        with tempfile.TemporaryDirectory() as shadow:
            write_float32_shadow(directory, Path(shadow))
            yield OnnxSession(shadow, usable), True
    else:
        yield OnnxSession(directory, usable), False


def make_batches(base: TrainingBase) -> list[Batch]:
    """The batches to compare: one padded on the right, one padded on the left, and a single long row."""
    context = base.config.max_position_embeddings
    decoded = min(_DECODED, context // 2)
    *rows, long = _token_rows(base, context - decoded)
    more = torch.randint(0, base.config.vocab_size, (len(rows), decoded), generator=torch.Generator().manual_seed(1))
    batches = []
    for name, some in (("right-padded", rows), ("left-padded", rows), ("single", [long])):
        ids, mask = _pad(some, left=name == "left-padded")
        grown = more[: len(some)]
        ids, mask = torch.cat([ids, grown], dim=1), torch.cat([mask, torch.ones_like(grown)], dim=1)
        batches.append(Batch(name, ids, mask, decoded))
    return batches


def _token_rows(base: TrainingBase, room: int) -> list[torch.Tensor]:
    """Four rows of different lengths and a long one; random tokens where the base has no tokenizer that can be read."""
    short, long = min(_SHORT, room), min(_LONG, room)
    try:
        tokenizer = AutoTokenizer.from_pretrained(base.directory)
        rows = [tokenizer(text)["input_ids"][:short] for text in _TEXTS]
    except Exception:  # what transformers raises for a missing or a damaged tokenizer has no common base
        rows = []
    if rows and all(rows):  # for some kinds of models a missing tokenizer is one that knows no word
        everything = [token for row in rows for token in row] * _LONG
        return [torch.tensor(row) for row in [*rows, everything[:long]]]
    generator = torch.Generator().manual_seed(0)
    lengths = (short, max(short // 2, 1), max(short // 4, 2), max(short - 3, 1), long)
    return [torch.randint(0, base.config.vocab_size, (length,), generator=generator) for length in lengths]


def _pad(rows: list[torch.Tensor], *, left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    length = max(len(row) for row in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        place = slice(length - len(row), length) if left else slice(0, len(row))
        ids[number, place] = row
        mask[number, place] = 1
    return ids, mask


def _run_twin(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    return compute_logits(model, batch.input_ids, batch.attention_mask)


def _run_export(session: OnnxSession, batch: Batch) -> torch.Tensor:
    """Logits of the whole batch, the last tokens one by one through the cache."""
    ids, mask = batch.input_ids.numpy(), batch.attention_mask.numpy()
    first = batch.prefilled
    logits, cache = session.forward(ids[:, :first], mask[:, :first])
    parts = [logits]
    for end in range(first + 1, ids.shape[1] + 1):
        logits, cache = session.forward(ids[:, end - 1 : end], mask[:, :end], cache)
        parts.append(logits)
    return torch.from_numpy(np.concatenate(parts, axis=1))


def compare_logits(
    reference: torch.Tensor, found: torch.Tensor, attention_mask: torch.Tensor, tie_margin: float
) -> Metrics:
    """Measure how far two sets of logits are apart where there are tokens.

    Args:
        reference: (batch, length, vocabulary).
        found: The same shape.
        attention_mask: (batch, length); padding is left out.
        tie_margin: A token whose two most probable successors in the reference are closer than this is a tie.

    Returns:
        The metrics. NaN anywhere makes max_abs and the divergences NaN, which no tolerance accepts.
    """
    max_abs, agree, ties = 0.0, 0, 0
    divergences = []
    for row in range(reference.shape[0]):  # a row at a time: float64 over the whole vocabulary is large
        keep = attention_mask[row].bool()
        expected, got = reference[row, keep].double(), found[row, keep].double()
        max_abs = float(torch.maximum(torch.tensor(max_abs), (expected - got).abs().max()))
        log_p, log_q = expected.log_softmax(-1), got.log_softmax(-1)
        divergences.append((log_p.exp() * (log_p - log_q)).sum(-1))
        top = expected.topk(2).values
        tie = (top[:, 0] - top[:, 1]) < tie_margin
        ties += int(tie.sum())
        agree += int((tie | (expected.argmax(-1) == got.argmax(-1))).sum()) - int(tie.sum())
    divergence = torch.cat(divergences)
    decided = divergence.numel() - ties
    return Metrics(
        max_abs=max_abs,
        mean_kl=float(divergence.mean().clamp(min=0)),
        max_kl=float(divergence.max().clamp(min=0)),
        top1=agree / decided if decided else 1.0,
        tokens=divergence.numel(),
        ties=ties,
    )


def is_within(metrics: Metrics | None, tolerance: Tolerance) -> bool:
    """Whether the metrics pass the gate. Comparisons with NaN are false, so NaN fails."""
    if metrics is None:
        return False
    return (
        metrics.mean_kl <= tolerance.kl
        and metrics.top1 >= tolerance.top1
        and (tolerance.max_abs is None or metrics.max_abs <= tolerance.max_abs)
    )


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
