"""An adapter and its base become a directory that onnxruntime opens."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
import torch
from onnx_ir import tensor_adapters
from onnx_ir.passes.common import ClearMetadataAndDocStringPass

from lora_deploy.adapter import TrainingRecord
from lora_deploy.checkpoint import read_json
from lora_deploy.errors import OutputError, UsageError
from lora_deploy.export.graph import WeightSource
from lora_deploy.export.merge import MergedParameters, hash_adapter
from lora_deploy.export.plan import ExportPlan, plan_export
from lora_deploy.export.weights import stream_weights
from lora_deploy.export.writer import TOKENIZER_FILES, commit, staging_directory, write_data, write_model
from lora_deploy.quantization.hashes import combine_hashes

if TYPE_CHECKING:
    from lora_deploy.verify import ParityReport

__all__ = ["ExportResult", "export_onnx"]

# Told during the work: what is being done, how much of it is done, and of how much.
OnProgress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class ExportResult:
    """What an export left.

    Attributes:
        output: The directory.
        bytes: Size of `model.onnx` and its data.
        report: The parity report; None where it was not asked for.
        warnings: What the user should know.
    """

    output: Path
    bytes: int
    report: ParityReport | None
    warnings: tuple[str, ...] = ()


def export_onnx(
    model: str | Path,
    adapter: str | Path | None = None,
    *,
    output: str | Path,
    merge: bool = True,
    precision: str | None = None,
    quantization: str = "auto",
    double_quant: bool = True,
    provider: str = "cpu",
    overwrite: bool = False,
    verify: bool = True,
    on_progress: OnProgress = lambda task, done, total: None,
) -> ExportResult:
    """Export an adapter and its training base to ONNX, and prove that the result computes what was trained.

    Args:
        model: The training base: a local directory or a hub id.
        adapter: Directory of the adapter; None to export the base alone.
        output: Directory to write.
        merge: Merge the adapter into the dequantized weights.
        precision: "fp32", "fp16" or "bf16"; None for fp32 on cpu and fp16 on cuda.
        quantization: What the training base was: "none", "nf4", "fp4", "int8", or "auto".
        double_quant: Whether nf4 and fp4 were double-quantized.
        provider: "cpu" or "cuda".
        overwrite: Replace an export that is there already.
        verify: Run the parity gate before anything is committed.
        on_progress: Is told the task, how much is done and of how much.

    Returns:
        What was written.

    Raises:
        UsageError, InputError: As `plan_export`; nothing was written.
        ParityError: The staged export does not compute what was trained; nothing was committed.
        OutputError: It could not be written; what was there before is unchanged.
    """
    if not merge:
        raise UsageError("only merged exports can be made", remedy="add --merge")
    plan = plan_export(
        model,
        adapter,
        output,
        precision=precision,
        quantization=quantization,
        double_quant=double_quant,
        provider=provider,
        overwrite=overwrite,
    )
    parameters = MergedParameters(plan.base, plan.adapter)
    with staging_directory(plan.output) as staging:
        _write(plan, parameters, staging, on_progress)
        warnings = _warnings(plan.record, combine_hashes(parameters.code_hashes))
        report = _prove(plan, staging, on_progress) if verify else None
        commit(staging, plan.output)
    size = sum(file.stat().st_size for file in plan.output.glob("model*.onnx*"))
    return ExportResult(plan.output, size, report, warnings)


def _write(plan: ExportPlan, parameters: MergedParameters, staging: Path, on_progress: OnProgress) -> None:
    written = 0

    def on_bytes(count: int) -> None:
        nonlocal written
        written += count
        on_progress("writing weights", written, plan.expected_bytes)

    graph = plan.graph.model
    stream = stream_weights(graph, _largest_first(plan), parameters)
    sha256 = write_data(graph, _and_constants(graph, stream), staging, on_bytes)
    ClearMetadataAndDocStringPass()(graph)
    graph.producer_name, graph.producer_version = "lora-deploy", version("lora-deploy")
    graph.metadata_props.update(_provenance(plan, sha256))
    write_model(graph, staging)
    _write_side_files(plan, staging)


def _largest_first(plan: ExportPlan) -> dict[str, WeightSource]:
    """The sources in the order of their parameters' sizes, else in that of the graph.

    The allocator holds on to pieces of what it gave before. With the largest weights first, the peak of memory does not
    grow with the number of layers.
    """
    sources, shapes = plan.graph.sources, plan.base.shapes
    return dict(sorted(sources.items(), key=lambda item: -math.prod(shapes[item[1].segments[0].parameter])))


def _and_constants(graph: ir.Model, stream: Iterator[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights, then the large constants that the graph brings itself (the tables of rotary embeddings)."""
    constants = [
        (name, value.const_value)
        for name, value in graph.graph.initializers.items()
        if value.const_value is not None and value.const_value.nbytes >= 1024
    ]
    yield from stream
    for name, constant in constants:
        dtype = tensor_adapters.to_torch_dtype(constant.dtype)
        yield name, torch.frombuffer(bytearray(constant.tobytes()), dtype=dtype).reshape(tuple(constant.shape.numpy()))


def _provenance(plan: ExportPlan, data_sha256: str) -> dict[str, str]:
    """What the model was made of, for `metadata_props`; no times, so that the same input gives the same bytes."""
    entries = {
        "lora_deploy.base_model": plan.model,
        "lora_deploy.mode": "merge",
        "lora_deploy.precision": plan.precision,
        "lora_deploy.provider": plan.provider,
        "lora_deploy.quantization": plan.base.scheme.model_dump_json(),
        "lora_deploy.base_sha256": plan.record.base_sha256 if plan.record else plan.base.sha256(),
        "lora_deploy.data_sha256": data_sha256,
        "lora_deploy.versions": json.dumps({name: _version(name) for name in ("mobius-onnx", "onnx-ir", "torch")}),
    }
    if plan.adapter is not None:
        entries["lora_deploy.adapter"] = plan.adapter.source
        entries["lora_deploy.adapter_sha256"] = hash_adapter(plan.adapter)
        entries["lora_deploy.adapter_config"] = json.dumps(json.loads(plan.adapter.config.to_json()), sort_keys=True)
    return entries


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown"


def _write_side_files(plan: ExportPlan, staging: Path) -> None:
    """Configuration and tokenizer, so that onnxruntime-genai and optimum open the directory too."""
    config = plan.base.config.to_dict()
    for key in ("_name_or_path", "dtype", "torch_dtype"):
        config.pop(key, None)
    config["dtype"] = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}[plan.precision]
    try:
        for name, values in (("config.json", config), ("genai_config.json", _genai_config(plan))):
            (staging / name).write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        for name in ("generation_config.json", *TOKENIZER_FILES):
            source = plan.base.directory / name
            if source.is_file():
                shutil.copyfile(source, staging / name)
    except OSError as error:
        raise OutputError("the export could not be written", file=staging, found=str(error)) from error


def _genai_config(plan: ExportPlan) -> dict[str, Any]:
    """The graph's, with the special tokens of generation_config.json, which knows every token that ends an answer."""
    config = {**plan.graph.genai_config, "model": dict(plan.graph.genai_config["model"])}
    file = plan.base.directory / "generation_config.json"
    generation = read_json(file) if file.is_file() else {}
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if generation.get(key) is not None:
            config["model"][key] = generation[key]
    return config


def _warnings(record: TrainingRecord | None, codes_sha256: str | None) -> tuple[str, ...]:
    if record is None or record.codes_sha256 in (None, codes_sha256):
        return ()
    return (
        "the quantized weights are not bit for bit those of the training: same checkpoint, but another device or "
        "version of bitsandbytes rounded some of them differently",
    )


def _prove(plan: ExportPlan, staging: Path, on_progress: OnProgress) -> ParityReport:
    from lora_deploy.verify import check_parity

    report = check_parity(
        staging, plan.base, plan.adapter, precision=plan.precision, provider=plan.provider, on_progress=on_progress
    )
    report.save(staging)
    report.require(plan.output)
    return report
