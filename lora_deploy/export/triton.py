"""A place in an NVIDIA Triton model repository: `NAME/config.pbtxt` beside `NAME/1/`, which is the export itself.

Triton's onnxruntime backend takes inputs with initializers, such as a hot-swap export's A and B, as optional ones where
`max_batch_size` is 0 (its `ValidateInputs`), so that batches stand in the dimensions themselves.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from lora_deploy.errors import OutputError, UsageError
from lora_deploy.inputs.json_files import read_json
from lora_deploy.inputs.model import local_directory
from lora_deploy.integrity import MODEL_NAME
from lora_deploy.task import find_task

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["CONFIG_FILE", "check_one_graph", "triton_config", "write_triton_config"]

CONFIG_FILE = "config.pbtxt"
_TYPES = {
    "FLOAT": "TYPE_FP32",
    "FLOAT16": "TYPE_FP16",
    "BFLOAT16": "TYPE_BF16",
    "INT64": "TYPE_INT64",
    "INT8": "TYPE_INT8",
}


def triton_config(model: ir.Model, name: str, *, gpu: bool) -> str:
    """The model's configuration, as protobuf text.

    Args:
        model: The graph, whose weights need not be there.
        name: Of the model in the repository.
        gpu: Whether it runs on GPUs.
    """
    lines = [f'name: "{name}"', 'backend: "onnxruntime"', "max_batch_size: 0"]
    optional = set(model.graph.initializers)
    for value in model.graph.inputs:
        lines += _tensor("input", value, optional=str(value.name) in optional)
    for value in model.graph.outputs:
        lines += _tensor("output", value)
    lines += [f"instance_group [ {{ count: 1 kind: {'KIND_GPU' if gpu else 'KIND_CPU'} }} ]"]
    return "\n".join(lines) + "\n"


def _tensor(kind: str, value: ir.Value, optional: bool = False) -> list[str]:
    assert value.dtype is not None
    assert value.shape is not None
    dims = ", ".join(str(dim) if isinstance(dim, int) and dim > 0 else "-1" for dim in value.shape)
    more = " optional: true" if optional else ""
    return [f'{kind} [ {{ name: "{value.name}" data_type: {_TYPES[value.dtype.name]} dims: [ {dims} ]{more} }} ]']


def check_one_graph(model: str | Path) -> None:
    """Refuse an encoder-decoder before it is exported, as far as its configuration is at hand.

    Args:
        model: The base: a directory, or an id of the hub, which is left for later.

    Raises:
        UsageError: It is an encoder-decoder, whose graphs are three.
    """
    directory = local_directory(model)
    config = read_json(directory / "config.json") if directory is not None else {}
    if find_task(config.get("architectures")) == "seq2seq-lm":
        raise _several_graphs(str(model))


def _several_graphs(found: str) -> UsageError:
    return UsageError(
        "an encoder-decoder is three graphs, which are no one model of Triton's",
        found=found,
        remedy="export it without --layout, and write an ensemble of the graphs by hand",
    )


def write_triton_config(export: Path, *, gpu: bool) -> None:
    """Write `config.pbtxt` beside the directory of an export, as one change.

    Args:
        export: The version's directory; its parent is named as the model.
        gpu: Whether it runs on GPUs.

    Raises:
        UsageError: The export is an encoder-decoder, whose graphs are three.
        OutputError: It could not be written; the export is there all the same.
    """
    import onnx_ir as ir

    model = ir.load(str(export / MODEL_NAME))
    if not len(model.graph):
        raise _several_graphs(str(export))
    name = export.resolve().parent.name
    file = export.parent / CONFIG_FILE
    partial = file.with_name(f".{CONFIG_FILE}.{os.getpid()}")
    try:
        partial.write_text(triton_config(model, name, gpu=gpu), encoding="utf-8")
        partial.replace(file)
    except OSError as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise OutputError("the model's configuration could not be written", file=file, found=str(error)) from error
