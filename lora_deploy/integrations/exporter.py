"""transformers' exporters: `AutoHfExporter` finds "onnx-lora" once this module has been imported."""

from __future__ import annotations

import json
import shutil
import tempfile
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import torch
from transformers.exporters.auto import register_backend
from transformers.exporters.base import ExportedModel, HfExporter
from transformers.exporters.configs import ExportConfigMixin
from transformers.exporters.metadata import ExportMetadata
from transformers.exporters.runners.base import ModelRunner
from transformers.modeling_outputs import CausalLMOutputWithPast, SequenceClassifierOutput, TokenClassifierOutput

from lora_deploy.errors import CheckpointError, UsageError
from lora_deploy.export import export_onnx
from lora_deploy.export.commit import link_or_copy
from lora_deploy.graph_check import read_graph
from lora_deploy.integrations.trained import save_trained
from lora_deploy.integrity import MODEL_NAME, export_files
from lora_deploy.manifest import BranchKind, Manifest
from lora_deploy.requantize.options import Requantization
from lora_deploy.run.adapters import Adapters
from lora_deploy.run.session import OnnxSession, Weights
from lora_deploy.versions import installed_versions

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["OnnxLoraConfig", "OnnxLoraExporter", "OnnxLoraRunner"]

_FORMAT = "onnx-lora"
_PLACES = ("base", "output", "adapter", "data")
_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
_OUTPUTS = {
    "causal-lm": CausalLMOutputWithPast,
    "sequence-classification": SequenceClassifierOutput,
    "token-classification": TokenClassifierOutput,
}


@dataclass
class OnnxLoraConfig(ExportConfigMixin):
    """How a model with an adapter becomes ONNX: the options of `export_onnx`, with their defaults.

    Attributes:
        export_format: "onnx-lora".
        base: The checkpoint that the base was loaded from; None for what the model says.
        output: Directory to write; None for one that lasts as long as the program, until `save_pretrained`.
        adapter: Directory to write the adapter to, which `lora-deploy verify` asks for later; None to keep none.
        merge, branch, precision, compute_dtype, expand, accuracy_level, cache, requantization, adapter_precision,
            graph, provider, verify, data, max_kl: As `export_onnx` takes them.
    """

    export_format: str = _FORMAT
    base: str | None = None
    output: str | None = None
    adapter: str | None = None
    merge: bool = True
    branch: BranchKind | None = None
    precision: str | None = None
    compute_dtype: str | None = None
    expand: bool = False
    accuracy_level: int | None = None
    cache: str | None = None
    requantization: Requantization | None = None
    adapter_precision: str | None = None
    graph: str = "auto"
    provider: str = "cpu"
    verify: bool = True
    data: Path | None = None
    max_kl: float | None = None

    def options(self) -> dict[str, Any]:
        """What `export_onnx` is given."""
        own = {"export_format", "base", "output", "adapter"}
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name not in own}

    def to_json_string(self) -> str:
        """The options as JSON, without the places of this machine."""
        values = {name: value for name, value in self.to_dict().items() if name not in _PLACES}
        return json.dumps(values, indent=2, sort_keys=True, default=repr)


class OnnxLoraExporter(HfExporter):
    """Exports a model in memory with its adapter (PEFT's or `get_lora_model`'s), from the checkpoint of its base.

    The result is that of `export_onnx`: the same files, and the same proof before they are handed over.
    """

    export_format = _FORMAT
    config_class = OnnxLoraConfig
    program_suffix = ".onnx"

    def export_program(
        self, model: PreTrainedModel, sample_inputs: Any, config: ExportConfigMixin
    ) -> tuple[ir.Model, ExportMetadata]:
        """Export the model. The graph is made of its configuration, so `sample_inputs` are not looked at.

        Raises:
            UsageError, InputError, ParityError, OutputError: As `export_onnx` and `save_trained`; an encoder-decoder
                is refused.
        """
        assert isinstance(config, OnnxLoraConfig)
        if getattr(model.config, "is_encoder_decoder", False):
            raise UsageError(
                "an encoder-decoder is three graphs, which this exporter cannot hand over as one",
                found=type(model).__name__,
                remedy="save the adapter, and use lora-deploy export or export_onnx",
            )
        scratch = Path(tempfile.mkdtemp(prefix="lora-deploy-"))
        try:
            adapter = Path(config.adapter or scratch / "adapter")
            record = save_trained(model, adapter, config.base)
            result = export_onnx(
                record.base_model,
                {adapter.name: adapter},
                output=config.output or scratch / "export",
                **config.options(),
            )
            program = self.load_program(result.output / MODEL_NAME)
        except BaseException:
            shutil.rmtree(scratch)
            raise
        weakref.finalize(program, shutil.rmtree, scratch, ignore_errors=True)
        return program, _metadata(model, program)

    def export(self, model: PreTrainedModel, sample_inputs: Any, config: Any) -> ExportedModel:
        """Export the model. `save_pretrained` leaves the configuration that the export has of its own."""
        component = self._export_component(model, sample_inputs, config)
        return ExportedModel({"model": component}, self.export_format)

    def export_for_generation(self, model: PreTrainedModel, sample_inputs: Any, config: Any, **_: Any) -> ExportedModel:
        """The same: one graph takes prompts and single tokens."""
        return self.export(model, sample_inputs, config)

    @classmethod
    def save_program(cls, program: ir.Model, path: str | Path) -> None:
        """Copy the export: graph, weights, adapters, tokenizer, report; a directory with older adapters cannot be saved
        to, for transformers moves what was copied over what is there."""
        path, origin = Path(path), Path(program.meta["path"]).parent
        if path.name != MODEL_NAME:
            raise UsageError("the graph of an export has one name", found=path.name, expected=MODEL_NAME)
        for file in export_files(origin, program.metadata_props):
            target = path.parent / file.relative_to(origin)
            target.parent.mkdir(exist_ok=True)
            link_or_copy(file, target)

    @classmethod
    def load_program(cls, path: str | Path) -> ir.Model:
        """Read the graph; its weights stay in their file.

        Raises:
            CheckpointError: It is damaged, or its weights are not beside it (of a repository of the hub transformers
                fetches the graph alone: fetch the whole with huggingface_hub.snapshot_download).
        """
        path = Path(path)
        try:
            read_graph(path)
        except CheckpointError as error:
            error.details["remedy"] = "export again; of a repository of the hub, fetch all of it: snapshot_download()"
            raise
        program = ir.load(str(path))
        program.meta["path"] = str(path)
        return program


class OnnxLoraRunner(ModelRunner):
    """Runs an export in onnxruntime, with what the model returned for outputs."""

    def __init__(self, metadata: ExportMetadata, session: OnnxSession, adapter: Mapping[str, Any]) -> None:
        self.metadata = metadata
        self.session = session
        self._adapter = adapter
        self._output = _OUTPUTS[session.manifest.task if session.manifest is not None else "causal-lm"]

    @property
    def device(self) -> torch.device:
        """Where the program runs."""
        return torch.device(self.session.provider)

    @classmethod
    def from_program(
        cls,
        program: ir.Model,
        metadata: ExportMetadata,
        device: Any = None,
        adapter: str | Mapping[str, float] | None = None,
        weights: Weights = "stored",
    ) -> OnnxLoraRunner:
        """Open the export.

        Args:
            program: As the exporter gave it.
            metadata: What the exporter recorded.
            device: "cpu" or "cuda"; None for the CPU.
            adapter: Of a branch, as `OnnxModel` takes it.
            weights: As `OnnxModel` takes it.
        """
        directory = Path(program.meta["path"]).parent
        kind = torch.device(device or "cpu").type
        session = OnnxSession(directory, kind, weights)  # type: ignore[arg-type]
        return cls(metadata, session, Adapters(session, directory).inputs(adapter))

    def __call__(self, share_inputs: bool = True, share_outputs: bool = False, **inputs: Any) -> Any:
        """Run it on `input_ids`, and what else there is of `attention_mask`, `token_type_ids` and `past_key_values`
        (what the last call returned; the mask is of past and new tokens then)."""
        arrays = {name: np.asarray(value) for name, value in inputs.items() if name != "past_key_values"}
        ids = arrays["input_ids"].astype(np.int64)
        mask = arrays.get("attention_mask", np.ones_like(ids)).astype(np.int64)
        past = inputs.get("past_key_values")
        logits, cache = self.session.forward(ids, mask, past, self._adapter, arrays.get("token_type_ids"))
        outputs: dict[str, Any] = {"logits": torch.from_numpy(logits)}
        if cache:
            outputs["past_key_values"] = cache
        return self._output(**outputs)


def _metadata(model: PreTrainedModel, program: ir.Model) -> ExportMetadata:
    """What the export takes, and with what it was made."""
    names = {str(value.name) for value in program.graph.inputs}
    taken = [name for name in ("input_ids", "attention_mask", "token_type_ids") if name in names]
    kwargs: dict[str, dict[str, Any]] = {name: {"rank": 2, "dtype": "int64"} for name in taken}
    if any(name.startswith("past_key_values.") for name in names):
        kwargs["past_key_values"] = {"container": "dict"}
    manifest = Manifest.read(program.metadata_props, program.meta["path"])
    return ExportMetadata(
        architecture=type(model).__name__,
        packages=installed_versions("transformers", "lora-deploy", "onnx", "onnxruntime"),
        export_dtype=_DTYPES[manifest.compute_dtype],
        export_device="cpu",
        kwargs=kwargs,
    )


register_backend(OnnxLoraExporter, OnnxLoraRunner)
