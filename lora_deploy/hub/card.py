"""Model cards: the hub's metadata, what the export is, its parity table, how to run it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from lora_deploy import __version__
from lora_deploy.adapter import TrainingRecord
from lora_deploy.config import LoraConfig
from lora_deploy.entries import recorded_adapters
from lora_deploy.integrity import MODEL_NAME, find_adapters
from lora_deploy.manifest import Manifest
from lora_deploy.quantization import QuantizationScheme
from lora_deploy.verify.report import ParityReport

__all__ = ["MARK", "adapter_card", "export_card"]

# By which a card that nobody has edited the head of is known as ours.
MARK = "<!-- made by lora-deploy; remove this line to keep your own card -->"

_PIPELINES = {
    "causal-lm": "text-generation",
    "sequence-classification": "text-classification",
    "token-classification": "token-classification",
    "seq2seq-lm": "text2text-generation",
}
_MODES = {
    None: "merged into its dequantized weights",
    "fixed": "as a branch beside its weights, built in",
    "hot-swap": "as branches beside its weights, chosen for each run",
    "pooled": "as branches beside its weights, chosen for each row of a batch",
}
_OPENERS = {"sequence-classification": "OnnxClassifier", "token-classification": "OnnxTokenClassifier"}


def export_card(
    directory: Path,
    repo_id: str,
    entries: Mapping[str, str],
    report: ParityReport,
    *,
    base_model: str | None,
    license: str | None,
) -> str:
    """The card of an export.

    Args:
        directory: The export.
        repo_id: Where it goes.
        entries: The graph's `metadata_props`.
        report: Its parity report.
        base_model: The base's id on the hub; None where it has none.
        license: The base's; None where it is not known.
    """
    manifest = Manifest.read(entries, directory / MODEL_NAME)
    data = _data(base_model, license, library_name="onnx", pipeline_tag=_PIPELINES[manifest.task], export=True)
    adapters = recorded_adapters(entries, directory / MODEL_NAME)
    lines = [
        *_head(data, repo_id),
        f"{_sources(adapters, base_model)}, {_MODES[manifest.branch]}; weights in {manifest.precision}, computed in "
        f"{manifest.compute_dtype}, for onnxruntime ({entries.get('lora_deploy.provider', 'cpu')}). "
        f"{_trained_on(manifest.quantization)}",
        "",
        "## Parity with the trained model",
        "",
        *_parity(report),
        "",
        "## Run it",
        "",
        *_run_export(
            repo_id,
            manifest,
            list(adapters),
            sorted({case.adapter for case in report.cases} & set(find_adapters(directory))),
        ),
    ]
    return "\n".join(lines) + "\n"


def adapter_card(directory: Path, repo_id: str, *, base_model: str | None, license: str | None) -> str:
    """The card of an adapter in PEFT's format.

    Args:
        directory: The adapter.
        repo_id: Where it goes.
        base_model: The base's id on the hub; None where it has none.
        license: The base's; None where it is not known.
    """
    config, record = LoraConfig.load(directory), TrainingRecord.load(directory)
    kind = next((name for task, name in _PIPELINES.items() if task == _task(config)), None)
    data = _data(base_model, license, library_name="peft", pipeline_tag=kind, export=False)
    base = base_model or "the base"
    command = f"lora-deploy export --model {base_model or 'BASE'} --adapter adapter --merge --output deployed"
    if record is None:
        command += " --quantization WHAT_THE_BASE_WAS"
    trained = _trained_on(record.quantization.model_dump_json()) if record is not None else ""
    lines = [
        *_head(data, repo_id),
        f"A LoRA adapter of rank {config.r} (alpha {config.lora_alpha:g}) for {base}. {trained}".strip(),
        "",
        "## Use it",
        "",
        "```sh",
        f"hf download {repo_id} --local-dir adapter",
        command,
        'lora-deploy run deployed --prompt "..."',
        "```",
        "",
        "The export is proved against the trained model before it is written.",
    ]
    return "\n".join(lines) + "\n"


def _data(base_model: str | None, license: str | None, *, export: bool, **values: Any) -> ModelCardData:
    tags = ["lora", "lora-deploy", *(["onnx", "onnxruntime"] if export else [])]
    return ModelCardData(base_model=base_model, license=license, tags=tags, **values)


def _head(data: ModelCardData, repo_id: str) -> list[str]:
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n")
    return [*str(card).rstrip().splitlines(), "", MARK, "", f"# {repo_id.rpartition('/')[2]}", ""]


def _sources(adapters: Mapping[str, Any], base_model: str | None) -> str:
    base = base_model or "its base"
    if not adapters:
        return f"{base} without an adapter"
    names = ", ".join(f"`{name}` (rank {adapter['config'].get('r', '?')})" for name, adapter in adapters.items())
    return f"The LoRA adapter{'s' if len(adapters) > 1 else ''} {names} on {base}"


def _trained_on(quantization: str) -> str:
    if not quantization:
        return ""
    scheme = QuantizationScheme.model_validate_json(quantization)
    return "Trained on the base as it is." if scheme.method == "none" else f"Trained on the base in {scheme}."


def _task(config: LoraConfig) -> str:
    kinds = {"SEQ_CLS": "sequence-classification", "TOKEN_CLS": "token-classification", "SEQ_2_SEQ_LM": "seq2seq-lm"}
    return kinds.get(config.task_type or "", "causal-lm")


def _parity(report: ParityReport) -> list[str]:
    """The cases as a table of Markdown."""
    limits = ", ".join(f"{name} {value:g}" for name, value in report.tolerance.items() if value is not None)
    what = "the trained model" if report.deployment is None else "the deployed weights, computed exactly"
    lines = [
        f"Logits of onnxruntime ({report.provider}) beside those of {what}; the base without the adapter must fail the "
        f"same limits ({limits}).",
        "",
        "| case | max abs | KL | top-1 | base alone: KL | top-1 |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for case in report.cases:
        alone = ["", ""] if case.control is None else [f"{case.control.mean_kl:.1e}", f"{case.control.top1:.1%}"]
        found = [f"{case.export.max_abs:.1e}", f"{case.export.mean_kl:.1e}", f"{case.export.top1:.1%}"]
        lines.append(f"| {' | '.join([case.label, *found, *alone])} |")
    if report.deployment is not None:
        lines += [
            "",
            f"Largest KL of a text between deployed and trained weights: {report.deployment.largest_kl:.2g} nats.",
        ]
    versions = ", ".join(f"{name} {number}" for name, number in sorted(report.versions.items()))
    return [*lines, "", f"lora-deploy {__version__}; {versions}."]


def _run_export(repo_id: str, manifest: Manifest, adapters: list[str], files: list[str]) -> list[str]:
    chosen = files or (adapters if manifest.branch == "pooled" else [])
    flag, argument = (f" --adapter {chosen[0]}", f', "{chosen[0]}"') if chosen else ("", "")
    if manifest.task == "seq2seq-lm":
        return [
            "```sh",
            f"hf download {repo_id} --local-dir model",
            "```",
            "",
            "optimum's `ORTModelForSeq2SeqLM` opens it.",
        ]
    opener = _OPENERS.get(manifest.task, "OnnxModel")
    call = 'classify(["..."])' if manifest.task in _OPENERS else 'generate("...")'
    return [
        "```sh",
        'pip install "lora-deploy[cpu]"',
        f"hf download {repo_id} --local-dir model",
        f'lora-deploy run model{flag} --prompt "..."',
        "```",
        "",
        "```python",
        f"from lora_deploy import {opener}",
        "",
        f'model = {opener}("model"{argument})',
        f"print(model.{call})",
        "```",
    ]
