"""Write a page: its program, the graph with required inputs, the weights, the adapters and the tokenizer."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_deploy.entries import FILES_ENTRY, recorded_files
from lora_deploy.errors import CheckpointError, InputError, OutputError, UsageError
from lora_deploy.export.commit import can_rename, exchange, link_or_copy, staging_directory, sync_tree, write_failure
from lora_deploy.export.required_inputs import require_inputs
from lora_deploy.inputs.json_files import read_json
from lora_deploy.integrity import DATA_PATTERN, MODEL_NAME, SEAL_ENTRY, check_files, find_adapters
from lora_deploy.manifest import Manifest
from lora_deploy.run.adapter_files import read_onnx_adapter
from lora_deploy.run.context import read_context_length
from lora_deploy.run.generate import find_eos_token_ids
from lora_deploy.tokenizer import load_tokenizer
from lora_deploy.web.bundle import build_bundle
from lora_deploy.web.server import ISOLATION

if TYPE_CHECKING:
    import onnx

__all__ = ["Page", "write_page"]

_MODEL_DIRECTORY, _DESCRIPTION, _MADE_BY = "model", "model.json", "lora-deploy web"
# What a page is made of; whatever else lies in its directory is somebody's own.
_PARTS = {"index.html", "assets", "_headers", _MODEL_DIRECTORY}
# A WebAssembly program's memory ends here, weights and all.
_MOST_BYTES = 4 << 30
_TYPES = {1: "float32", 3: "int8", 10: "float16"}  # onnx.TensorProto.DataType, by onnxruntime-web's names


@dataclass(frozen=True)
class Page:
    """What was written.

    Attributes:
        directory: The page; `index.html` is in it.
        adapters: Names of the adapters that a visitor can choose from.
        bytes: Of graph and weights. A visitor's browser fetches them once, the tokenizer, and onnxruntime-web, which is
            14 MB, or 27 with WebGPU.
    """

    directory: Path
    adapters: tuple[str, ...]
    bytes: int


def write_page(
    export: str | Path,
    output: str | Path,
    *,
    overwrite: bool = False,
) -> Page:
    """Write a static page that runs an export.

    Args:
        export: What `lora-deploy export` wrote: a causal language model, in any precision but bfloat16.
        output: The page's directory.
        overwrite: Replace an older page; what is not of it stays.

    Raises:
        InputError: The export is damaged, or no such model.
        UsageError: There is no Node.js, or a browser cannot run this export.
        OutputError: The output is there already, or could not be written.
    """
    import onnx

    asked, export, output = Path(output), Path(export), Path(os.path.realpath(output))
    _check_output(output, overwrite)
    entries = check_files(export)
    graph = onnx.load(str(export / MODEL_NAME), load_external_data=False)
    manifest = _check_export(export, entries, graph)
    names = sorted(name for name in recorded_files(entries, export / MODEL_NAME) if Path(name).match(DATA_PATTERN))
    data = {name: (export / name).stat().st_size for name in names}
    if sum(data.values()) > _MOST_BYTES:
        raise UsageError(
            "the export is larger than the memory of a browser's program",
            found=f"{sum(data.values()) / 1e9:,.1f} GB",
            expected=f"at most {_MOST_BYTES / 1e9:,.1f} GB",
            remedy="export with --precision int4, or take a smaller base",
        )
    program = build_bundle()
    with staging_directory(output) as staging:
        try:
            shutil.copytree(program, staging, dirs_exist_ok=True)
            (staging / "_headers").write_text(_headers(), encoding="utf-8")
            model = staging / _MODEL_DIRECTORY
            model.mkdir()
            for name in names:
                link_or_copy(export / name, model / name)
            required = set(require_inputs(graph))
            kept = [entry for entry in graph.metadata_props if entry.key not in (SEAL_ENTRY, FILES_ENTRY)]
            del graph.metadata_props[:]
            graph.metadata_props.extend(kept)
            graph_bytes = (model / MODEL_NAME).write_bytes(graph.SerializeToString(deterministic=True))
            adapters = _write_adapters(export, model, manifest)
            tokenizer = load_tokenizer(export)
            (model / "tokenizer.json").write_text(_backend_of(tokenizer, export), encoding="utf-8")
            description = {
                "made_by": _MADE_BY,
                "name": export.resolve().name,
                "graph": {"file": MODEL_NAME, "bytes": graph_bytes},
                "data": [{"file": name, "bytes": size} for name, size in data.items()],
                "branch": manifest.branch,
                "gpu": _needed_of_gpu(graph, manifest),
                "adapters": adapters,
                "slots": _inputs(graph, lambda name: name in required and name != "adapter_ids"),
                "cache": _inputs(graph, lambda name: name.startswith("past_key_values.")),
                "has_position_ids": any(value.name == "position_ids" for value in graph.graph.input),
                "eos_token_ids": sorted(find_eos_token_ids(export, tokenizer)),
                "context_length": read_context_length(export),
                "chat_template": tokenizer.chat_template,
                "special_tokens": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
            }
            (model / _DESCRIPTION).write_text(json.dumps(description, indent=1, sort_keys=True), encoding="utf-8")
            _put(staging, output)
        except OSError as error:
            raise write_failure(output, error) from error
    return Page(asked, tuple(str(adapter["name"]) for adapter in adapters), sum(data.values()) + graph_bytes)


def _check_output(output: Path, overwrite: bool) -> None:
    if not output.exists():
        return
    if not output.is_dir() or (any(output.iterdir()) and not _is_page(output)):
        raise OutputError(
            "something else is there", file=output, expected="a new or empty directory, or a page of lora-deploy's"
        )
    if not overwrite and any(output.iterdir()):
        raise OutputError("there is a page already", file=output, remedy="replace it with --overwrite")
    if not can_rename(output):
        raise OutputError(
            "a page takes its place in one step, which this place does not allow",
            file=output,
            expected="a directory that can be renamed: no mount point, not the working directory",
            remedy="write it into another directory, and copy it",
        )


def _is_page(output: Path) -> bool:
    file = output / _MODEL_DIRECTORY / _DESCRIPTION
    try:
        return read_json(file).get("made_by") == _MADE_BY if file.is_file() else False
    except InputError:
        return False


def _check_export(export: Path, entries: Mapping[str, str], graph: onnx.ModelProto) -> Manifest:
    file = export / MODEL_NAME
    if not graph.graph.node:
        raise UsageError("a page runs one graph", found="an encoder-decoder, of three", remedy="export a decoder")
    manifest = Manifest.read(dict(entries), file)
    if manifest.task != "causal-lm":
        raise UsageError("a page chats with a causal language model", found=manifest.task)
    if manifest.compute_dtype == "bf16":
        raise UsageError(
            "browsers have no bfloat16", found=file, remedy="export with --precision int4, or another that is not bf16"
        )
    return manifest


def _needed_of_gpu(graph: onnx.ModelProto, manifest: Manifest) -> str | None:
    """The type that a GPU must compute in; None where onnxruntime-web's kernels for it are wrong.

    Its GroupQueryAttention with a bias on WebGPU (1.30) is: from prompts of 32 tokens on the text is another.
    """
    biased = any(node.op_type == "GroupQueryAttention" and any(node.input[10:11]) for node in graph.graph.node)
    return None if biased else manifest.compute_dtype


def _write_adapters(export: Path, model: Path, manifest: Manifest) -> list[dict[str, Any]]:
    """The adapters as safetensors, each named by its content, which browsers may keep."""
    from safetensors.numpy import save

    if manifest.branch == "pooled":
        return [{"name": name, "file": None} for name in manifest.pool]
    written = []
    for name, file in find_adapters(export).items() if manifest.branch == "hot-swap" else ():
        content = save(read_onnx_adapter(file, manifest))
        path = model / f"adapter-{hashlib.sha256(content).hexdigest()[:16]}.safetensors"
        path.write_bytes(content)
        written.append({"name": name, "file": {"file": path.name, "bytes": len(content)}})
    return written


def _backend_of(tokenizer: Any, export: Path) -> str:
    """The tokenizer as it is used, which need not be what the base's tokenizer.json says."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise CheckpointError("the tokenizer has no form that a browser can run", file=export)
    return str(backend.to_str())


def _inputs(graph: onnx.ModelProto, wanted: Callable[[str], bool]) -> list[dict[str, Any]]:
    return [
        {
            "name": value.name,
            "type": _TYPES[value.type.tensor_type.elem_type],
            "dims": [dim.dim_value or None for dim in value.type.tensor_type.shape.dim],
        }
        for value in graph.graph.input
        if wanted(value.name)
    ]


def _headers() -> str:
    """For hosts of static pages that read a file of this name, as Netlify and Cloudflare Pages do."""
    return "/*\n" + "".join(f"  {name}: {value}\n" for name, value in ISOLATION.items())


def _put(staging: Path, output: Path) -> None:
    if not output.exists():
        sync_tree(staging)
        staging.rename(output)
        return
    for path in output.iterdir():
        if path.name not in _PARTS:
            copy = shutil.copytree if path.is_dir() and not path.is_symlink() else link_or_copy
            copy(path, staging / path.name)
    sync_tree(staging)
    if not exchange(staging, output):
        older = staging.with_name(f"{staging.name}.older")
        output.rename(older)
        staging.rename(output)
        shutil.rmtree(older, ignore_errors=True)
