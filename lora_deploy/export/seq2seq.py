"""Encoder-decoders: three traced graphs that share one file of weights, named as optimum names them.

mobius' T5 takes no attention mask, neither for the encoder nor for the decoder's look at it: with padding its logits
are wrong. So the graphs are traced.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass
from torch import nn
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedConfig, PreTrainedModel

from lora_deploy.errors import UsageError
from lora_deploy.export.branch import add_slot_inputs
from lora_deploy.export.graph import Graph, Segment, WeightSource, as_unsupported
from lora_deploy.export.lower import Lowered
from lora_deploy.export.outputs import OutputChange
from lora_deploy.export.traced import DTYPES, finish_trace, trace_module, unfilled_model
from lora_deploy.export.writer import INLINE_BYTES, write_model
from lora_deploy.manifest import CodedWeight, Manifest
from lora_deploy.slots import Slot
from lora_deploy.task import Task

__all__ = ["DECODER", "ENCODER", "PARTS", "WITH_PAST", "check_seq2seq", "join_parts", "trace_parts", "write_parts"]

ENCODER, DECODER, WITH_PAST = "encoder_model.onnx", "decoder_model.onnx", "decoder_with_past_model.onnx"
PARTS = (ENCODER, DECODER, WITH_PAST)

_BATCH, _NEW, _PAST, _READ = 2, 3, 5, 7  # sizes of the example, all different
_SIDES = ("decoder", "encoder")  # optimum's names of a decoder's own cache and of that of what it reads
_KINDS = ("key", "value")


def check_seq2seq(
    task: Task,
    *,
    branch: str | None,
    precision: str,
    compute: str,
    own: str,
    adapter_precision: str | None,
) -> None:
    """What cannot be done with an encoder-decoder; raises UsageError.

    Args:
        task: Of the model.
        branch: None to merge.
        precision: Of the weights.
        compute: Type of the computation.
        own: The base's scheme.
        adapter_precision: "int8", or None.
    """
    if task != "seq2seq-lm":
        return
    refused = {
        "--branch --pool": branch == "pooled",
        f"--precision {precision}": precision in ("int8", "int4") and (branch is None or own != "int8"),
        "--compute-dtype bf16": compute == "bf16",
        "--adapter-precision int8": adapter_precision is not None,
    }
    for option, asked in refused.items():
        if asked:
            raise UsageError(
                "this is not made for encoder-decoders",
                found=option,
                expected="--merge or --branch in fp32 or fp16, or --branch with the base's codes",
                remedy=f"leave {option.split()[0]} out",
            )


class _Encoder(nn.Module):
    """input_ids, attention_mask (batch, length) -> last_hidden_state (batch, length, width)."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.encoder = model.encoder

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.encoder(input_ids=input_ids, attention_mask=attention_mask)[0]
        return hidden


class _Decoder(nn.Module):
    """What the decoder and its head make of new tokens; logits and the cache, each layer's keys and values in turn.

    The children have the names that they have in the model, so that parameters have theirs in the graph.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.decoder, self.lm_head = model.decoder, model.lm_head
        self.layers = len(model.decoder.block)
        self.width = model.config.d_model
        # T5 1.0, whose head is the embedding, scales what the head reads; 1.1 and mT5 do not, tied or not.
        self.factor = self.width**-0.5 if getattr(model.config, "scale_decoder_outputs", False) else None

    def _decode(self, input_ids: torch.Tensor, mask: torch.Tensor, hidden: torch.Tensor, cache: Any) -> torch.Tensor:
        output = self.decoder(
            input_ids=input_ids,
            encoder_hidden_states=hidden,
            encoder_attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
        )[0]
        logits: torch.Tensor = self.lm_head(output if self.factor is None else output * self.factor)
        return logits

    def _values(self, cache: Any, sides: tuple[str, ...]) -> list[torch.Tensor]:
        both = {"decoder": cache.self_attention_cache, "encoder": cache.cross_attention_cache}
        found = []
        for layer in range(self.layers):
            for side in sides:
                found += [both[side].layers[layer].keys, both[side].layers[layer].values]
        return found


class _Prefill(_Decoder):
    """The first tokens."""

    def forward(
        self, encoder_attention_mask: torch.Tensor, input_ids: torch.Tensor, encoder_hidden_states: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        logits = self._decode(input_ids, encoder_attention_mask, encoder_hidden_states, cache)
        return (logits, *self._values(cache, _SIDES))


class _WithPast(_Decoder):
    """Further tokens, with the cache: the keys and values of what the encoder gave do not change."""

    def forward(
        self, encoder_attention_mask: torch.Tensor, input_ids: torch.Tensor, past: list[torch.Tensor]
    ) -> tuple[torch.Tensor, ...]:
        own, read = DynamicCache(), DynamicCache()
        for layer in range(self.layers):
            keys, values, read_keys, read_values = past[4 * layer : 4 * layer + 4]
            own.update(keys, values, layer)
            read.update(read_keys, read_values, layer)
        # That there is something to look at is all that the decoder asks of it: its keys are in the cache.
        hidden = encoder_attention_mask[:, :, None].to(past[0].dtype).expand(-1, -1, self.width)
        cache = EncoderDecoderCache(own, read)
        logits = self._decode(input_ids, encoder_attention_mask, hidden, cache)
        return (logits, *self._values(cache, _SIDES[:1]))


def trace_parts(
    config: PreTrainedConfig, aliases: Mapping[str, str], *, precision: str, file: str | Path
) -> dict[str, Graph]:
    """Trace encoder, decoder, and decoder with a cache.

    Args:
        config: The model's configuration, without quantization.
        aliases: Names of tied parameters -> the name whose values they share, so that all graphs call them the same.
        precision: "fp32" or "fp16".
        file: The configuration's file, for messages.

    Returns:
        The graphs by the names of their files.

    Raises:
        CheckpointError: torch cannot trace the model.
    """
    with as_unsupported(config.model_type, file):
        model = unfilled_model(config, DTYPES[precision])
        state = model.state_dict()
        traced = {
            ENCODER: _trace_encoder(model),
            DECODER: _trace_prefill(model),
            WITH_PAST: _trace_with_past(model),
        }
    graphs = {}
    for name, part in traced.items():
        graph = finish_trace(part, f"{config.model_type}_{name.removesuffix('_model.onnx')}", state)
        sources = {key: _canonical(source, aliases) for key, source in graph.sources.items()}
        graphs[name] = replace(graph, sources=sources)
    return graphs


def _canonical(source: WeightSource, aliases: Mapping[str, str]) -> WeightSource:
    segments = tuple(Segment(aliases.get(one.parameter, one.parameter), one.rows) for one in source.segments)
    return replace(source, segments=segments)


def _trace_encoder(model: PreTrainedModel) -> ir.Model:
    ids = torch.ones(_BATCH, _READ, dtype=torch.int64)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    axes = {name: {0: "batch", 1: "encoder_sequence"} for name in inputs}
    return trace_module(_Encoder(model), inputs, axes, ["last_hidden_state"])


def _trace_prefill(model: PreTrainedModel) -> ir.Model:
    read = {0: "batch", 1: "encoder_sequence"}
    inputs = {
        "encoder_attention_mask": torch.ones(_BATCH, _READ, dtype=torch.int64),
        "input_ids": torch.ones(_BATCH, _NEW, dtype=torch.int64),
        "encoder_hidden_states": torch.zeros(_BATCH, _READ, model.config.d_model, dtype=model.dtype),
    }
    axes = {"encoder_attention_mask": read, "input_ids": {0: "batch", 1: "sequence"}, "encoder_hidden_states": read}
    module = _Prefill(model)
    return trace_module(module, inputs, axes, ["logits", *_cache_names("present", module.layers, _SIDES)])


def _trace_with_past(model: PreTrainedModel) -> ir.Model:
    module, config = _WithPast(model), model.config
    past, past_axes = [], []
    for _ in range(module.layers):
        for length, name in ((_PAST, "past_sequence"), (_READ, "encoder_sequence")):
            for _ in _KINDS:
                past.append(torch.zeros(_BATCH, config.num_heads, length, config.d_kv, dtype=model.dtype))
                past_axes.append({0: "batch", 2: name})
    inputs: dict[str, Any] = {
        "encoder_attention_mask": torch.ones(_BATCH, _READ, dtype=torch.int64),
        "input_ids": torch.ones(_BATCH, _NEW, dtype=torch.int64),
        "past": past,
    }
    axes: dict[str, Any] = {
        "encoder_attention_mask": {0: "batch", 1: "encoder_sequence"},
        "input_ids": {0: "batch", 1: "sequence"},
        "past": past_axes,
    }
    names = [*list(inputs)[:2], *_cache_names("past_key_values", module.layers, _SIDES)]
    outputs = ["logits", *_cache_names("present", module.layers, _SIDES[:1])]
    return trace_module(module, inputs, axes, outputs, input_names=names)


def _cache_names(prefix: str, layers: int, sides: tuple[str, ...]) -> list[str]:
    return [f"{prefix}.{layer}.{side}.{kind}" for layer in range(layers) for side in sides for kind in _KINDS]


def join_parts(parts: Mapping[str, Lowered], name: str) -> Lowered:
    """Everything that the graphs wait for, once, in a graph without nodes; it becomes `model.onnx`.

    Args:
        parts: The lowered graphs, by the names of their files. Their constants get names that tell them apart.
        name: Of the joint graph.
    """
    shelf = ir.Model(ir.Graph([], [], nodes=[], name=name, opset_imports={"": 20}), ir_version=10)
    sources: dict[str, WeightSource] = {}
    coded: dict[str, CodedWeight] = {}
    slots: dict[str, Slot] = {}
    changes: dict[str, OutputChange] = {}
    for file, part in parts.items():
        graph = part.graph.model.graph
        for key, value in list(graph.initializers.items()):
            if value.const_value is not None:
                if value.const_value.nbytes >= INLINE_BYTES:
                    value.name = f"{file.removesuffix('.onnx')}.{key}"
                    _put(shelf, str(value.name), value)
                continue
            _put(shelf, _stored_name(part, key), value)
            if key in part.graph.sources:
                sources[_stored_name(part, key)] = part.graph.sources[key]
        coded |= {weight.codes: weight for weight in part.coded if weight.codes not in coded}
        slots |= {slot.name: slot for slot in part.slots}
        changes |= {change.name: change for change in part.changes}
    joint = Graph(shelf, sources, genai_config={})
    return Lowered(joint, tuple(coded.values()), tuple(slots.values()), tuple(changes.values()), parts=dict(parts))


def _stored_name(part: Lowered, initializer: str) -> str:
    """Tied parameters are stored once, under the name of the first."""
    source = part.graph.sources.get(initializer)
    if source is None or len(source.segments) > 1:
        return initializer
    return source.segments[0].parameter


def _put(shelf: ir.Model, name: str, value: ir.Value) -> None:
    there = shelf.graph.initializers.get(name)
    if there is None:
        shelf.graph.initializers[name] = ir.val(
            name, dtype=value.dtype, shape=value.shape, const_value=value.const_value
        )
    else:
        assert (there.dtype, there.shape) == (value.dtype, value.shape), name


def write_parts(joint: Lowered, manifest: Manifest, metadata: Mapping[str, str], directory: Path) -> None:
    """Write each graph, after the weights have been written.

    Args:
        joint: From `join_parts`; its initializers have their values.
        manifest: What the export says of itself.
        metadata: All that is written into every graph, the manifest's entries apart.
        directory: Where the files go.
    """
    shelf = joint.graph.model.graph.initializers
    weights = {weight.codes: weight for weight in manifest.coded}
    for file, part in joint.parts.items():
        graph = part.graph.model
        for name, value in graph.graph.initializers.items():
            stored = shelf.get(_stored_name(part, name))
            if stored is not None and stored.const_value is not None:
                value.const_value = _renamed(stored.const_value, name, directory)
        ClearMetadataAndDocStringPass()(graph)
        if manifest.branch == "hot-swap":
            add_slot_inputs(graph, part.slots)
        coded = tuple(weights[one.codes].model_copy(update={"output": one.output}) for one in part.coded)
        own = manifest.model_copy(update={"coded": coded})
        graph.producer_name, graph.producer_version = "lora-deploy", metadata["lora_deploy.version"]
        graph.metadata_props.update({**metadata, **own.entries()})
        write_model(graph, directory, file)


def _renamed(tensor: ir.TensorProtocol, name: str, directory: Path) -> ir.TensorProtocol:
    if not isinstance(tensor, ir.ExternalTensor):
        return ir.Tensor(tensor.numpy(), dtype=tensor.dtype, name=name)
    return ir.ExternalTensor(
        tensor.location, tensor.offset, tensor.length, tensor.dtype, shape=tensor.shape, name=name, base_dir=directory
    )
