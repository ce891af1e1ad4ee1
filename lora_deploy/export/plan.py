"""Every check that can be made before anything is written."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast, get_args

from lora_deploy.adapter import LoraAdapter, TrainingRecord, read_adapter
from lora_deploy.errors import AdapterError, CheckpointError, OutputError, UsageError
from lora_deploy.export.graph import Graph, build_graph
from lora_deploy.export.sites import find_sites, lower_dense, share_initializers
from lora_deploy.export.writer import MODEL_NAME
from lora_deploy.quantization import QuantizationScheme
from lora_deploy.quantization.base import TrainingBase

__all__ = ["ExportPlan", "Precision", "Provider", "plan_export"]

Precision = Literal["fp32", "fp16", "bf16"]
Provider = Literal["cpu", "cuda"]


@dataclass(frozen=True)
class ExportPlan:
    """An export that can be carried out: it exists only if all checks passed.

    Attributes:
        model: The training base, as it was named.
        base: The base as it was trained on.
        adapter: The adapter to merge; None for the base alone.
        record: What training left beside the adapter, if it did.
        precision: Type of the weights and of the computation.
        provider: The execution provider it is meant for.
        output: Directory to write.
        graph: The graph, lowered, without weights.
        expected_bytes: Size of the weights.
    """

    model: str
    base: TrainingBase
    adapter: LoraAdapter | None
    record: TrainingRecord | None
    precision: Precision
    provider: Provider
    output: Path
    graph: Graph
    expected_bytes: int


def plan_export(
    model: str | Path,
    adapter: str | Path | None,
    output: str | Path,
    *,
    precision: str | None = None,
    quantization: str = "auto",
    double_quant: bool = True,
    provider: str = "cpu",
    overwrite: bool = False,
) -> ExportPlan:
    """Check that an export can be made and prepare its graph. Nothing is written.

    Args:
        model: The training base: a local directory or a hub id.
        adapter: Directory of the adapter; None to export the base alone.
        output: Directory to write.
        precision: "fp32", "fp16" or "bf16"; None for fp32 on cpu and fp16 on cuda.
        quantization: What the training base was: "none", "nf4", "fp4", "int8", or "auto" to read it from the
            checkpoint or from what training left beside the adapter.
        double_quant: Whether nf4 and fp4 were double-quantized.
        provider: "cpu" or "cuda".
        overwrite: Whether an export that is there already may be replaced.

    Raises:
        UsageError: The options contradict each other or do not say what the base was.
        InputError: Model or adapter are missing, damaged or do not fit each other.
        OutputError: The output exists.
    """
    provider, precision = _check_options(provider, precision)
    output = Path(output)
    try:
        if output.is_symlink():
            output = output.resolve()
        _check_output(output, overwrite, [Path(model), *([] if adapter is None else [Path(adapter)])])
    except OSError as error:
        raise OutputError("the output cannot be used", file=output, found=error.strerror or str(error)) from error
    lora = read_adapter(adapter, lazy=True) if adapter is not None else None
    record = TrainingRecord.load(adapter) if adapter is not None else None
    base = TrainingBase(model, _scheme(quantization, double_quant, record))
    if base.prequantized and quantization == "none":
        raise CheckpointError(
            "the checkpoint is quantized already, but it is said that the base was not",
            file=base.directory / "config.json",
            tensor="quantization_config",
            found=base.scheme,
            expected="none",
            remedy="leave --quantization out, or give the full-precision checkpoint",
        )
    if not base.prequantized and quantization == "auto" and record is None and lora is not None:
        raise UsageError(
            "it is not known which base the adapter was trained on: neither the checkpoint nor the adapter says",
            file=adapter,
            expected="the quantization in training",
            remedy="add --quantization nf4 (QLoRA), fp4, int8, or none for a full-precision base",
        )
    if lora is not None:
        linears = {name: layer.shape for name, layer in base.linears.items()}
        if base.head is not None:
            rows, columns = base.shapes[f"{base.head}.weight"]
            linears[base.head] = (rows, columns)
        lora.check_against(base.shapes, linears)
    if record is not None:
        _check_record(base, record, str(adapter))
    graph = _prepare_graph(base, lora, precision, provider)
    item = 4 if precision == "fp32" else 2
    values = (graph.model.graph.initializers[name] for name in graph.sources)
    expected = sum(item * math.prod(value.shape.numpy() if value.shape else ()) for value in values)
    return ExportPlan(str(model), base, lora, record, precision, provider, output, graph, expected)


def _check_options(provider: str, precision: str | None) -> tuple[Provider, Precision]:
    if provider not in get_args(Provider):
        raise UsageError("there is no such provider", found=provider, expected=" or ".join(get_args(Provider)))
    if precision is None:
        precision = "fp16" if provider == "cuda" else "fp32"
    if precision not in get_args(Precision):
        raise UsageError("there is no such precision", found=precision, expected=", ".join(get_args(Precision)))
    if precision == "bf16" and provider == "cpu":
        raise UsageError(
            "onnxruntime's CPU provider has no bfloat16 kernels",
            found="--precision bf16 --provider cpu",
            remedy="take --precision fp32 or fp16, or --provider cuda",
        )
    return cast(Provider, provider), cast(Precision, precision)


def _check_output(output: Path, overwrite: bool, inputs: list[Path]) -> None:
    if any(path.is_dir() and path.resolve() == output.resolve() for path in inputs):
        raise OutputError(
            "the output is the directory of the model or the adapter", file=output, remedy="choose another --output"
        )
    if output.exists() and not output.is_dir():
        raise OutputError("the output is a file", file=output, expected="a directory that is new or empty")
    is_export = (output / MODEL_NAME).exists()
    if output.is_dir() and any(output.iterdir()) and not (overwrite and is_export):
        there = "an export" if is_export else "other files"
        raise OutputError(
            "the output exists",
            file=output,
            found=there,
            expected="a directory that is new or empty",
            remedy="choose another --output" + (", or add --overwrite" if is_export else ""),
        )


def _scheme(quantization: str, double_quant: bool, record: TrainingRecord | None) -> QuantizationScheme | None:
    if quantization not in ("auto", "none", "nf4", "fp4", "int8"):
        raise UsageError("there is no such quantization", found=quantization, expected="auto, none, nf4, fp4 or int8")
    recorded = record.quantization if record else None
    method = recorded.method if recorded else "none"
    asked = QuantizationScheme(
        method=method if quantization == "auto" else cast(Literal["none", "nf4", "fp4", "int8"], quantization),
        double_quant=double_quant,
    )
    # Double quantization is the default, so only asking for none can contradict the record.
    if recorded and (
        recorded.method != asked.method or (asked.is_4bit and recorded.double_quant and not asked.double_quant)
    ):
        raise AdapterError(
            "the adapter was trained on a base of another quantization than the one asked for",
            found=asked,
            expected=recorded,
            remedy="leave --quantization and --no-double-quant out",
        )
    return recorded or (None if quantization == "auto" else asked)


def _check_record(base: TrainingBase, record: TrainingRecord, adapter: str) -> None:
    found = base.sha256()
    if found != record.base_sha256:
        raise AdapterError(
            "the adapter was trained on another base: the weights of this model are not the recorded ones",
            file=base.directory,
            found=f"sha256 {found[:16]}…",
            expected=f"sha256 {record.base_sha256[:16]}… ({record.base_model}, recorded in {adapter})",
            remedy="give the model that the adapter was trained on",
        )


def _prepare_graph(base: TrainingBase, adapter: LoraAdapter | None, precision: Precision, provider: Provider) -> Graph:
    """Build the graph and lower its linear layers. A tie that the adapter breaks is broken in the graph too."""
    trained = {*adapter.parameters, *(f"{name}.weight" for name in adapter.updates)} if adapter else set()
    broken = {alias for alias, name in base.aliases.items() if alias in trained or name in trained}
    shapes = {name: shape for name, shape in base.shapes.items() if name not in base.aliases or name in broken}
    config = base.config
    if broken:
        config = type(config).from_dict({**config.to_dict(), "tie_word_embeddings": False})
    graph = build_graph(config, shapes, precision=precision, provider=provider, file=base.directory / "config.json")
    lower_dense(graph.model, find_sites(graph.model))
    return Graph(graph.model, share_initializers(graph.model, graph.sources), graph.genai_config)
