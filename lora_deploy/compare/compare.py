"""Candidates are exported one after the other, run as the user would run them, measured, and removed."""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, cast

from lora_deploy.compare.candidates import Candidate, default_candidates
from lora_deploy.compare.measure import KeptLogits, choose_texts, logits_of, measure_speed
from lora_deploy.compare.picture import PICTURE_NAME, can_draw, draw_comparison
from lora_deploy.compare.report import REPORT_NAME, Comparison, Row
from lora_deploy.errors import LoraDeployError, OutputError, UsageError
from lora_deploy.export.commit import staging_directory
from lora_deploy.export.export import export_onnx
from lora_deploy.export.plan import ExportPlan, plan_export
from lora_deploy.integrity import PAGE_NAME
from lora_deploy.quantization.base import TrainingBase
from lora_deploy.requantize.text import Text
from lora_deploy.run.session import OnnxSession, import_onnxruntime
from lora_deploy.targets import check_provider
from lora_deploy.verify.reference import apply_live, compute_logits, load_twin
from lora_deploy.verify.texts import compare_on_text
from lora_deploy.versions import installed_versions

__all__ = ["compare_precisions"]

_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_LIBRARIES = ("bitsandbytes", "lora-deploy", "onnxruntime", "onnxruntime-gpu", "torch", "transformers")

OnProgress = Callable[[str, int, int], None]


def compare_precisions(
    model: str | Path,
    adapter: str | Path,
    *,
    output: str | Path,
    data: Path | None = None,
    calibration: Path | None = None,
    quantization: str = "auto",
    double_quant: bool = True,
    provider: str = "cpu",
    candidates: Sequence[Candidate] | None = None,
    overwrite: bool = False,
    on_progress: OnProgress = lambda task, done, total: None,
) -> Comparison:
    """Try the precisions on a model, an adapter and its data, so that the user can choose.

    Every candidate is exported without a parity check beside `output`, opened in onnxruntime, measured, and removed:
    the disk holds one at a time, and the trained function's logits. Only the first stays open, for the speed of the
    others is measured in turns with its own. `output` gets `comparison.json`,
    `report.html`, which shows it, and `comparison.png` where matplotlib is installed.

    Args:
        model: The training base: a local directory or a hub id.
        adapter: Directory of the adapter, of a causal language model.
        output: Directory to write, new or empty.
        data: JSONL text of the task to compare on; None for the training data, where it is known.
        calibration: JSONL text that merged int8 and int4 weights are rounded for; None for the training data.
        quantization: What the training base was: "none", "nf4", "fp4", "int8", or "auto".
        double_quant: Whether nf4 and fp4 were double-quantized.
        provider: "cpu", or "cuda" where onnxruntime has it here.
        candidates: What to try; None for `default_candidates`. The first that works is the yardstick of speed.
        overwrite: Replace an older comparison in `output`.
        on_progress: Is told what is being done, how much of it is done and of how much.

    Returns:
        What was found. A candidate that fails with one of our errors is a row with that error.

    Raises:
        UsageError: The provider is not here, it is not known what the base was, or it is no language model.
        InputError: Model, adapter or data are missing, damaged or do not fit each other.
        OutputError: The output is not empty, or cannot be written.
    """
    usable, output = _check_provider(provider), Path(output)
    _check_output(output, overwrite)
    named = {Path(adapter).resolve().name: adapter}
    asked: dict[str, Any] = {"quantization": quantization, "double_quant": double_quant, "provider": provider}
    with staging_directory(output) as work:
        plan = plan_export(model, named, work / "export", precision="fp16", **asked)
        if plan.base.task != "causal-lm":
            raise UsageError(
                "only language models are compared", found=plan.base.task, remedy="export each precision by itself"
            )
        texts = choose_texts(plan.base, data, calibration, [record.data for record in plan.records.values()])
        trained, alone, kept = _references(plan, texts, work, on_progress)
        bench = _Bench(plan.base, usable, texts, kept, on_progress)
        if candidates is None:
            candidates = default_candidates(plan.base.scheme.method, usable, calibration)
        rows, warnings = [], []
        for _, group in groupby(candidates, key=lambda one: dict(one.options)):
            sharing = list(group)
            arguments = {"model": model, "adapter": named, "output": work / "export", **asked, **sharing[0].options}
            found, warned = bench.try_export(sharing, arguments)
            rows += found
            warnings += warned
        for row, candidate in zip(rows, candidates, strict=True):
            row.command = _command(model, adapter, candidate, quantization, double_quant, provider)
        if any(not text.held_out for text in texts):
            warnings.append("a text has no rows that the rounding was not calibrated on: it looks better than it is")
        comparison = Comparison(
            model=str(model),
            adapter=str(adapter),
            provider=provider,
            trained=trained,
            base_alone=alone,
            rows=rows,
            versions=installed_versions(*_LIBRARIES),
            cpu_count=os.cpu_count(),
            warnings=list(dict.fromkeys(warnings)),
        )
        _write(comparison, work, output)
    return comparison


def _check_provider(provider: str) -> Literal["cpu", "cuda"]:
    """The provider, if onnxruntime can be asked for it here."""
    available = import_onnxruntime().get_available_providers()
    if _PROVIDERS.get(check_provider(provider)) not in available:
        raise UsageError(
            "a comparison runs every candidate, and onnxruntime does not have this provider here",
            found=provider,
            expected=" or ".join(name for name, known in _PROVIDERS.items() if known in available),
            remedy="compare on the machine that it will run on, or leave --provider out",
        )
    return cast(Literal["cpu", "cuda"], provider)


def _check_output(output: Path, overwrite: bool) -> None:
    """Whether a comparison may be written there."""
    try:
        if output.exists() and not output.is_dir():
            raise OutputError("the output is a file", file=output, expected="a directory that is new or empty")
        is_comparison = (output / REPORT_NAME).exists()
        if output.is_dir() and any(output.iterdir()) and not (overwrite and is_comparison):
            raise OutputError(
                "the output exists",
                file=output,
                found="a comparison" if is_comparison else "other files",
                expected="a directory that is new or empty",
                remedy="choose another --output" + (", or add --overwrite" if is_comparison else ""),
            )
    except OSError as error:
        raise OutputError("the output cannot be used", file=output, found=error.strerror or str(error)) from error


def _references(
    plan: ExportPlan, texts: Sequence[Text], work: Path, on_progress: OnProgress
) -> tuple[Row, Row, KeptLogits]:
    """What was trained and the base alone, and the logits of the first; one model is in memory at a time."""
    on_progress("reference", 0, 2)
    adapter = next(iter(plan.adapters.values()))
    kept = KeptLogits(apply_live(load_twin(plan.base), adapter), work)
    trained = Row(name="trained (PyTorch)", texts=[compare_on_text(text, kept, kept) for text in texts])
    kept.release()
    on_progress("reference", 1, 2)
    base = load_twin(plan.base)
    results = [compare_on_text(text, kept, lambda ids, mask: compute_logits(base, ids, mask)) for text in texts]
    on_progress("reference", 2, 2)
    return trained, Row(name="base alone", texts=results), kept


@dataclass
class _Bench:
    """What candidates are measured with; the first that opens is the yardstick of the others' speed."""

    base: TrainingBase
    provider: Literal["cpu", "cuda"]
    texts: Sequence[Text]
    kept: KeptLogits
    on_progress: OnProgress
    yardstick: OnnxSession | None = None

    def try_export(self, sharing: Sequence[Candidate], arguments: dict[str, Any]) -> tuple[list[Row], list[str]]:
        """A row of each candidate that shares an export, and what the export warned of."""
        directory: Path = arguments["output"]
        self.on_progress(sharing[0].name, 0, self._steps)
        try:
            result = export_onnx(**arguments, verify=False)
            size = sum(file.stat().st_size for file in directory.glob("model*.onnx*"))
            return [self._measure(one, directory, size / 1e6) for one in sharing], list(result.warnings)
        except LoraDeployError as error:
            for one in sharing:
                self.on_progress(one.name, self._steps, self._steps)
            return [Row(name=one.name, weights=one.weights, error=str(error)) for one in sharing], []
        finally:
            shutil.rmtree(directory, ignore_errors=True)

    @property
    def _steps(self) -> int:
        """Export, speed, texts."""
        return 2 + len(self.texts)

    def _measure(self, candidate: Candidate, directory: Path, megabytes: float) -> Row:
        row = Row(name=candidate.name, weights=candidate.weights)
        self.on_progress(candidate.name, 1, self._steps)
        try:
            session = OnnxSession(directory, self.provider, candidate.weights)
            config = self.base.config
            yardstick = self.yardstick or session
            speed = measure_speed(session, yardstick, config.vocab_size, config.max_position_embeddings)
            row.tokens_per_second, row.relative_speed = speed.tokens_per_second, speed.relative
            for done, text in enumerate(self.texts):
                self.on_progress(candidate.name, 2 + done, self._steps)
                row.texts.append(compare_on_text(text, self.kept, logits_of(session)))
            row.megabytes = megabytes
            self.yardstick = yardstick
        except LoraDeployError as error:
            row = Row(name=candidate.name, weights=candidate.weights, error=str(error))
        self.on_progress(candidate.name, self._steps, self._steps)
        return row


def _command(
    model: str | Path, adapter: str | Path, candidate: Candidate, quantization: str, double_quant: bool, provider: str
) -> str:
    """The command line that exports a candidate."""
    words = ["lora-deploy", "export", "--model", str(model), "--adapter", str(adapter), *candidate.flags]
    if quantization != "auto":
        words += ["--quantization", quantization]
    if not double_quant:
        words.append("--no-double-quant")
    if provider != "cpu":
        words += ["--provider", provider]
    return shlex.join([*words, "--output", "DIR"])


def _write(comparison: Comparison, work: Path, output: Path) -> None:
    """Page, picture and numbers; the numbers come last."""
    if can_draw():
        draw_comparison(comparison, work / PICTURE_NAME)
    from lora_deploy.pages.comparison_page import comparison_page  # which knows the report

    page = comparison_page(comparison)
    with _writing(output):
        (work / PAGE_NAME).write_bytes(page)
        comparison.save(work)
        output.mkdir(exist_ok=True)
        (output / PICTURE_NAME).unlink(missing_ok=True)
        for name in (PICTURE_NAME, PAGE_NAME, REPORT_NAME):
            if (work / name).is_file():
                (work / name).replace(output / name)


@contextmanager
def _writing(output: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(
            "the comparison could not be written", file=output, found=error.strerror or str(error)
        ) from error
