"""The cases of a parity check: what is compared with what, one result each."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lora_deploy.verify.batches import Batch
from lora_deploy.verify.metrics import compare_logits, is_within
from lora_deploy.verify.report import CaseResult
from lora_deploy.verify.sessions import Exported
from lora_deploy.verify.tolerances import Tolerance

__all__ = ["MixedBatch", "compare_all", "compare_batch", "weak_effects"]

_CLEAR_EFFECT = 10  # times the tolerance
_TINY = 1e-30


def compare_all(
    label: str,
    batches: Sequence[Batch],
    trained: Sequence[torch.Tensor],
    exported: Sequence[torch.Tensor],
    alone: Sequence[torch.Tensor] | None,
    tolerance: Tolerance,
) -> list[CaseResult]:
    """One export on every batch.

    Args:
        label: Name of the adapter.
        batches: What was run.
        trained: The reference's logits of each.
        exported: The export's.
        alone: Those of the control; None where there is no adapter.
        tolerance: The gate.
    """
    results = []
    for number, batch in enumerate(batches):
        control = alone[number] if alone is not None and batch.tells_apart else None
        results += compare_batch(label, batch, trained[number], exported[number], control, tolerance)
    return results


def compare_batch(
    label: str,
    batch: Batch,
    trained: torch.Tensor,
    exported: torch.Tensor,
    alone: torch.Tensor | None,
    tolerance: Tolerance,
) -> list[CaseResult]:
    """One export on one batch, prefill and decoding apart; the arguments are those of `compare_all`."""
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


class MixedBatch:
    """Batches whose rows run with different adapters, every adapter and none among them."""

    def __init__(self, batches: Sequence[Batch], names: Sequence[str]) -> None:
        self.number, self.batch = next((n, batch) for n, batch in enumerate(batches) if batch.name == "left-padded")
        rows = self.batch.input_ids.shape[0]
        choices = [None, *names]
        choices = (choices * rows)[: -(-len(choices) // rows) * rows]
        self.runs = [choices[start : start + rows] for start in range(0, len(choices), rows)]
        self.references: dict[str | None, torch.Tensor] = {}

    def keep(self, name: str | None, trained: list[torch.Tensor]) -> None:
        """Remember what each row is with this adapter."""
        self.references[name] = trained[self.number]

    def compare(self, exported: Exported, tolerance: Tolerance) -> list[CaseResult]:
        """One case for each run; the control is the base alone in every row."""
        results = []
        for number, choices in enumerate(self.runs):
            trained = torch.stack([self.references[name][row] for row, name in enumerate(choices)])
            found = exported.run_rows(self.batch, choices)
            label = f"mixed {number + 1}"
            control = self.references[None] if any(choices) else None
            results += compare_batch(label, self.batch, trained, found, control, tolerance)
        return results


def weak_effects(results: Sequence[CaseResult], tolerance: Tolerance) -> list[str]:
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
