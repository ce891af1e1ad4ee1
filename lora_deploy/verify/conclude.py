"""What the cases of a check come to: the verdict, and the report that carries it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from lora_deploy.verify.cases import weak_effects
from lora_deploy.verify.report import CaseResult, ParityReport
from lora_deploy.verify.tolerances import Tolerance
from lora_deploy.versions import installed_versions

__all__ = ["conclude"]

_LIBRARIES = ("bitsandbytes", "lora-deploy", "mobius-onnx", "onnxruntime", "onnxruntime-gpu", "torch", "transformers")


def conclude(results: Sequence[CaseResult], tolerance: Tolerance, notes: Sequence[str], **found: Any) -> ParityReport:
    """The report of a check, with its verdict.

    Args:
        results: What was run.
        tolerance: The gate.
        notes: What limits the check; a note on adapters of little effect is added.
        found: The other fields of `ParityReport`.
    """
    controls = [not result.control_passed for result in results if result.control is not None]
    control_failed = all(controls) if controls else None
    report = ParityReport(
        tolerance=asdict(tolerance),
        cases=list(results),
        control_failed=control_failed,
        passed=all(result.passed for result in results) and control_failed is not False,
        notes=[*notes, *weak_effects(results, tolerance)],
        versions=installed_versions(*_LIBRARIES),
        **found,
    )
    report.passed = report.passed and report.rounds_to_numbers and report.keeps_max_kl
    return report
