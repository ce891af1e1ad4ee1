"""What the parity check found: every metric, one gate."""

from __future__ import annotations

import json
import math
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel

from lora_deploy.errors import DataError, OutputError, ParityError, UsageError
from lora_deploy.integrity import MODEL_NAME, PAGE_NAME, REPORT_NAME, UNSEALED, seal_bytes, seal_of
from lora_deploy.verify.codes import CodesResult
from lora_deploy.verify.deployment_report import DeploymentResult

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["CaseResult", "LayerErrors", "Metrics", "ParityReport", "check_comparison"]


def check_comparison(data: Path | None, max_kl: float | None) -> None:
    """Make sure, before any work, that deployed and trained weights can be compared as it is asked for.

    Args:
        data: The text.
        max_kl: The limit.

    Raises:
        UsageError: The limit is negative, or no number.
        DataError: The file of the text is not there.
    """
    if max_kl is not None and not max_kl >= 0:
        raise UsageError("a divergence is not negative", found=max_kl, expected="--max-kl 0.05 for one")
    if data is not None and not Path(data).is_file():
        raise DataError("there is no text to compare on", file=data, remedy="change --compare-on, or leave it out")


class Metrics(BaseModel):
    """How far two sets of logits are apart.

    Attributes:
        max_abs: Largest difference of a logit.
        mean_kl: Mean Kullback-Leibler divergence from the reference, nats a token.
        max_kl: The largest of a single token.
        top1: Share of tokens, ties apart, whose most probable successor is the same.
        tokens: How many tokens were compared.
        ties: How many of them were ties.
    """

    max_abs: float
    mean_kl: float
    max_kl: float
    top1: float
    tokens: int
    ties: int


class CaseResult(BaseModel):
    """One case: the export, and the negative control, against the same reference.

    Attributes:
        adapter: Name of the adapter, "no adapter", or "mixed"; empty where there is nothing to choose.
        name: What was run.
        export: The export against the twin.
        control: The base without its adapter against the export; None where there is no adapter.
        passed: Whether the export is within the tolerance.
        control_passed: Whether the control is, as it must not be.
    """

    adapter: str = ""
    name: str
    export: Metrics
    control: Metrics | None
    passed: bool
    control_passed: bool = False

    @property
    def label(self) -> str:
        """What was run, with which adapter."""
        return f"{self.adapter}: {self.name}" if self.adapter else self.name


class LayerErrors(BaseModel):
    """Relative errors of the keys and values of each layer, the larger of the two, first layer first.

    Attributes:
        adapter: As in the cases.
        export: The export against the twin.
        control: The base without its adapter against the twin; None where there is no adapter.
    """

    adapter: str = ""
    export: list[float]
    control: list[float] | None = None


class ParityReport(BaseModel):
    """The whole check.

    Attributes:
        precision: Which row of the table of tolerances was the gate.
        provider: The execution provider that ran.
        tolerance: The gate: limits by name.
        cases: What was run.
        control_failed: Whether the base alone fails the gate, as it must; None where there is no adapter.
        passed: The gate.
        layers: How far what each layer leaves in the cache is off, for each adapter; empty where there is no cache. No
            part of the gate.
        codes: What the comparison of the codes found; None where no weight is kept as codes.
        activation_rounding: What rounding activations to int8 (accuracy level 4) adds, at worst: the export as it is
            against the same graph without; no part of the gate, but that it is finite. None where nothing is rounded.
        deployment: The deployed weights against the trained ones; None where they are the same, up to the rounding to
            the type that is computed in.
        max_kl: The limit that was asked for; None for none.
        bitsandbytes_gap: How far bitsandbytes' own forward is from the twin (8-bit bases: it quantizes activations).
        notes: What limits the check.
        versions: Versions of the libraries that ran.
    """

    precision: str
    provider: str
    tolerance: dict[str, float | None]
    cases: list[CaseResult]
    control_failed: bool | None
    passed: bool
    layers: list[LayerErrors] = []
    codes: CodesResult | None = None
    activation_rounding: Metrics | None = None
    deployment: DeploymentResult | None = None
    max_kl: float | None = None
    bitsandbytes_gap: Metrics | None = None
    notes: list[str] = []
    versions: dict[str, str] = {}

    @property
    def largest_kl(self) -> float:
        """What `max_kl` limits: the largest KL of a text, or of a case where nothing but the export differs."""
        if self.deployment is not None:
            return self.deployment.largest_kl
        found = [case.export.mean_kl for case in self.cases]
        return next((kl for kl in found if math.isnan(kl)), max(found))

    @property
    def rounds_to_numbers(self) -> bool:
        """Whether the logits are finite, too, where activations are rounded."""
        return self.activation_rounding is None or math.isfinite(self.activation_rounding.mean_kl)

    @property
    def keeps_max_kl(self) -> bool:
        """Whether the limit is kept. NaN keeps none."""
        return self.max_kl is None or self.largest_kl <= self.max_kl

    def save(self, directory: Path) -> None:
        """Write `parity.json`, sealed, with the seal of the graph that it is about (`lora_deploy.integrity`).

        The page that shows an older one goes.

        Raises:
            OutputError: It could not be written; an older one is as it was.
        """
        file = directory / REPORT_NAME
        partial = directory / f".{REPORT_NAME}.partial"
        try:
            graph = seal_of(MODEL_NAME, (directory / MODEL_NAME).read_bytes())
            values = {**self.model_dump(), "model_sha256": graph, "report_sha256": UNSEALED}
            text = json.dumps(values, indent=2, sort_keys=True) + "\n"
            partial.write_bytes(seal_bytes(REPORT_NAME, text.encode()))
            (directory / PAGE_NAME).unlink(missing_ok=True)  # it shows the older one
            partial.replace(file)
        except OSError as error:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
            raise OutputError("the parity report could not be written", file=file, found=str(error)) from error

    def failures(self) -> str:
        """What does not hold, in one line; empty if the gate passes."""
        parts = [
            f"{case.label}: max abs {case.export.max_abs:.3g}, KL {case.export.mean_kl:.3g}, "
            f"top-1 {case.export.top1:.2%}"
            for case in self.cases
            if not case.passed
        ]
        if self.control_failed is False:
            parts.append(
                "the adapter changes next to nothing (was it trained?): without it, "
                + ", ".join(
                    f"{case.label}: KL {case.control.mean_kl:.1e}"
                    for case in self.cases
                    if case.control is not None and case.control_passed
                )
            )
        if not self.rounds_to_numbers:
            parts.append("with activations rounded to int8 (accuracy level 4), logits are not finite")
        if not self.keeps_max_kl:
            parts.append(f"KL {self.largest_kl:.3g} from the trained model, more than {self.max_kl:g}")
        return "; ".join(parts)

    def require(self, output: Path) -> None:
        """Raise unless the gate passes.

        Args:
            output: The export, for the message.

        Raises:
            ParityError: The export does not compute what was trained, or the check cannot tell.
        """
        if self.passed:
            return
        holds = self.rounds_to_numbers and all(case.passed for case in self.cases)
        if holds and self.control_failed is not False:
            raise ParityError(
                "the deployed model is further from the trained one than --max-kl allows",
                file=output,
                found=f"KL {self.largest_kl:.3g} nats a token",
                expected=f"at most {self.max_kl:g}",
                remedy="take more bits (--precision int8, --keep float:LAYERS, --correction 16), keep the trained base "
                "with --branch, or allow more",
            )
        if holds:
            raise ParityError(
                "the parity check proves nothing: without its adapter the base is within the tolerance too",
                file=output,
                found=self.failures(),
                expected="an adapter whose effect is larger than the tolerance",
                remedy="if the adapter is meant to change so little: --precision fp32, whose tolerance is the finest, "
                "or export with --no-verify",
            )
        raise ParityError(
            f"the export does not compute what was trained\n{self.summary()}",
            file=output,
            found=self.failures(),
            remedy="please report it; export with --no-verify writes it all the same",
        )

    def summary(self) -> str:
        """The cases as plain text, a line each."""
        limits = ", ".join(f"{name} {value:g}" for name, value in self.tolerance.items() if value is not None)
        lines = [f"{self.precision} on {self.provider} ({limits})"]
        for case in self.cases:
            control = "" if case.control is None else f" | base alone: KL {case.control.mean_kl:.3g}"
            lines.append(
                f"  {'ok  ' if case.passed else 'FAIL'} {case.label}: max abs {case.export.max_abs:.3g}, "
                f"KL {case.export.mean_kl:.3g}, top-1 {case.export.top1:.2%}{control}"
            )
        return "\n".join(lines)

    def table(self) -> Table:
        """The cases as a table for the screen."""
        from rich import box
        from rich.table import Table

        limit = self.tolerance
        what = "trained model" if self.deployment is None else "deployed weights"
        title = f"Parity with the {what} ({self.precision}, {self.provider})"
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, show_footer=True)
        max_abs, control = limit.get("max_abs"), "must fail" if self.control_failed is not None else ""
        for heading, footer in (
            ("case", "tolerance"),
            ("max abs", "" if max_abs is None else f"{max_abs:.0e}"),
            ("KL", f"{limit['kl']:.0e}"),
            ("top-1", f"{limit['top1']:.1%}"),
            ("base: KL", control),
            ("top-1", ""),
            ("", "ok" if self.passed else "FAIL"),
        ):
            justify: Literal["left", "right"] = "left" if heading in ("case", "") else "right"
            table.add_column(heading, footer, justify=justify, no_wrap=True)
        for case in self.rows():
            table.add_row(
                case.label,
                f"{case.export.max_abs:.1e}",
                f"{case.export.mean_kl:.1e}",
                f"{case.export.top1:.1%}",
                "" if case.control is None else f"{case.control.mean_kl:.1e}",
                "" if case.control is None else f"{case.control.top1:.1%}",
                "ok" if case.passed else "FAIL",
            )
        return table

    def rows(self) -> list[CaseResult]:
        """The cases; where there are adapters to choose from, one row each, with the worst of every metric."""
        groups: dict[str, list[CaseResult]] = {}
        for case in self.cases:
            groups.setdefault(case.adapter, []).append(case)
        return self.cases if len(groups) == 1 else [_worst(cases) for cases in groups.values()]


def _worst(cases: list[CaseResult]) -> CaseResult:
    """Several cases as one. The worst of a control is where it is closest to passing."""
    exports = [case.export for case in cases]
    controls = [case.control for case in cases if case.control is not None]
    export = exports[0].model_copy(
        update={
            "max_abs": max(one.max_abs for one in exports),
            "mean_kl": max(one.mean_kl for one in exports),
            "top1": min(one.top1 for one in exports),
        }
    )
    control = None
    if controls:
        lowest, highest = min(one.mean_kl for one in controls), max(one.top1 for one in controls)
        control = controls[0].model_copy(update={"mean_kl": lowest, "top1": highest})
    passed = all(case.passed for case in cases)
    name = f"{cases[0].adapter}, worst of {len(cases)}"
    return CaseResult(name=name, export=export, control=control, passed=passed)
