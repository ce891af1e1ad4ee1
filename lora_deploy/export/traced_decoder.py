"""The graph of a causal language model with its key-value cache, traced by torch from transformers' own code.

Slower to make and to run than mobius' graph, and right wherever transformers is: for models and variants that mobius
does not know or gets wrong. No weights are needed.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import nn
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from lora_deploy.errors import CheckpointError
from lora_deploy.export.graph import Graph, Segment, WeightSource, as_unsupported, check_sources, quiet
from lora_deploy.export.traced import _simplify, _spell_out_linears, _strip_metadata
from lora_deploy.task import auto_class

__all__ = ["trace_decoder"]

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# The first with Gelu.
_OPSET = 20
_BATCH, _NEW, _PAST = 2, 5, 7  # different, and none of them 1, which torch would take for a constant
# Of these the frequencies depend on the longest position of a call: a trace would keep those of its example.
_LENGTH_DEPENDENT = ("dynamic", "longrope")

_REMEDY = "if mobius knows this kind of model, --graph mobius may build it: the parity check is then its only judge"
# Keys and values of each layer.
Past = list[tuple[torch.Tensor, torch.Tensor]]


def trace_decoder(
    config: PreTrainedConfig, shapes: Mapping[str, tuple[int, ...]], *, precision: str, file: str | Path
) -> Graph:
    """Trace the graph of a causal language model.

    Inputs are named as in mobius' graphs: `input_ids`, `position_ids` (for a model that takes them), both int64
    (batch, new), `attention_mask` int64 (batch, past + new), and `past_key_values.N.key` and `.value`
    (batch, heads, past, width); outputs are `logits` (batch, new, vocabulary), `present.N.key` and `.value`. Layers
    that look back over a window keep the whole past too, and mask it. Linear layers are spelled
    Transpose(W) -> MatMul, as mobius spells them, so that the same pass finds them.

    Args:
        config: The model's configuration, without quantization.
        shapes: Shape of each parameter of the transformers model; tied ones once.
        precision: "fp32", "fp16" or "bf16".
        file: The configuration's file, for messages.

    Returns:
        The graph. Initializers that hold a parameter wait for their values.

    Raises:
        CheckpointError: torch cannot trace the model for every batch and length, or the trace would be of some only.
    """
    _refuse_length_dependent(config, file)
    with as_unsupported(config.model_type, file, _REMEDY):
        model = _unfilled_model(config, _DTYPES[precision])
        past = _example_past(model, file)
        traced = _trace(_WithCache(model), past)
    _check_sizes(traced, file)
    traced.graph.name = config.model_type
    sources = _empty_parameters(traced, model, shapes)
    _simplify(traced)
    _strip_metadata(traced)
    _spell_out_linears(traced, sources)
    if precision != "bf16":
        _widen_bfloat16(traced)
    kept = {name: source for name, source in sources.items() if name in traced.graph.initializers}
    check_sources(traced, set(kept), kept, dict(shapes), file)
    return Graph(traced, kept, genai_config={})


def _refuse_length_dependent(config: PreTrainedConfig, file: str | Path) -> None:
    parameters: Mapping[str, Any] = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, Mapping)]
    for one in [parameters, *nested]:
        if one.get("rope_type") in _LENGTH_DEPENDENT:
            raise CheckpointError(
                "this model's rotary frequencies change with the length of the text, which no traced graph follows",
                file=file,
                tensor="rope_parameters",
                found=f"rope_type {one['rope_type']}",
                remedy="this model cannot be exported yet; please open an issue with its config.json",
            )


class _WithCache(nn.Module):
    """The model as a function of tensors only: the cache goes in and comes out as keys and values."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        past: Past,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, Past]:
        """Logits (batch, new, vocabulary) and the cache with the new tokens."""
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        if position_ids is not None:
            inputs["position_ids"] = position_ids
        cache = DynamicCache(past)
        output = self.model(**inputs, **{_cache_argument(self.model): cache}, use_cache=True, return_dict=True)
        layers: list[Any] = cache.layers
        return output.logits, [(layer.keys, layer.values) for layer in layers]


def _cache_argument(model: PreTrainedModel) -> str:
    """transformers 5.24 renames it, and warns of the old name."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def _unfilled_model(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model with memory that is never touched for its parameters, and with its real constants."""
    with no_init_weights():
        model: PreTrainedModel = auto_class("causal-lm").from_config(
            copy.deepcopy(config), attn_implementation="eager", dtype=dtype, trust_remote_code=False
        )
    model.tie_weights()
    return model.train(False)  # type: ignore[no-any-return]


def _example_past(model: PreTrainedModel, file: str | Path) -> Past:
    """An example of the cache, with the heads and widths that a run without memory shows."""
    with torch.device("meta"):
        bare: Any = type(model)(copy.deepcopy(model.config))
        bare.to(model.dtype)
    ids = torch.ones((_BATCH, _NEW), dtype=torch.int64, device="meta")
    cache = DynamicCache()
    with torch.no_grad():
        bare(ids, attention_mask=ids, **{_cache_argument(bare): cache}, use_cache=True)
    past = []
    for layer in cache.layers:
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if keys is None or values is None or keys.ndim != 4 or keys.shape[2] != _NEW:
            raise CheckpointError(
                "this model remembers the past otherwise than by keys and values of every token",
                file=file,
                tensor=f"model_type {model.config.model_type}",
                found=type(layer).__name__,
                expected="keys and values (batch, heads, tokens, width) in every layer",
                remedy="this model cannot be exported yet",
            )
        past.append(
            tuple(torch.zeros(_BATCH, one.shape[1], _PAST, one.shape[3], dtype=one.dtype) for one in (keys, values))
        )
    return past  # type: ignore[return-value]


def _trace(model: _WithCache, past: Past) -> ir.Model:
    inputs = {
        "input_ids": torch.ones((_BATCH, _NEW), dtype=torch.int64),
        "attention_mask": torch.ones((_BATCH, _PAST + _NEW), dtype=torch.int64),
        "position_ids": torch.arange(_PAST, _PAST + _NEW).repeat(_BATCH, 1),
    }
    if "position_ids" not in inspect.signature(model.model.forward).parameters:
        del inputs["position_ids"]
    sizes = {name: {0: "batch", 1: "total" if name == "attention_mask" else "new"} for name in inputs}
    layer = tuple({0: "batch", 2: "past"} for _ in "kv")
    with quiet("torch.onnx"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            model,
            (past,),
            kwargs=inputs,
            dynamo=True,
            dynamic_shapes={"past": [layer for _ in past], **sizes},
            input_names=[*_cache_names("past_key_values", len(past)), *inputs],
            output_names=["logits", *_cache_names("present", len(past))],
            opset_version=_OPSET,
            optimize=False,  # it would fold what lies in the parameters' memory into the graph
            verbose=False,
        )
    assert program is not None
    inputs_first = sorted(program.model.graph.inputs, key=lambda value: str(value.name).startswith("past_key_values"))
    program.model.graph.inputs[:] = inputs_first
    return program.model


def _widen_bfloat16(traced: ir.Model) -> None:
    """Multiply bfloat16 numbers as float32 and round the product: the same bits, and onnxruntime's CPU can do it.

    Falcon's slopes are bfloat16 in models of every type.
    """
    for node in list(traced.graph):
        if node.op_type != "Mul" or node.outputs[0].dtype != ir.DataType.BFLOAT16:
            continue
        wide = [ir.node("Cast", [value], attributes={"to": ir.DataType.FLOAT.value}) for value in node.inputs]
        product = ir.node("Mul", [one.outputs[0] for one in wide])
        back = ir.node("Cast", [product.outputs[0]], attributes={"to": ir.DataType.BFLOAT16.value})
        new = [*wide, product, back]
        for number, one in enumerate(new):
            one.name = f"{node.name}.float_{number}"
        ir.convenience.replace_nodes_and_values(traced.graph, node, [node], new, [node.outputs[0]], [back.outputs[0]])


def _cache_names(prefix: str, layers: int) -> Sequence[str]:
    return [f"{prefix}.{layer}.{part}" for layer in range(layers) for part in ("key", "value")]


def _check_sizes(traced: ir.Model, file: str | Path) -> None:
    """Batch and lengths must have stayed open."""
    for value in (*traced.graph.inputs, *traced.graph.outputs):
        places = (0, 2) if ".key" in str(value.name) or ".value" in str(value.name) else (0, 1)
        if value.shape is None or any(isinstance(value.shape[place], int) for place in places):
            raise CheckpointError(
                "the traced graph is for one size of batch or one length only",
                file=file,
                tensor=value.name,
                found=value.shape,
            )


def _empty_parameters(
    traced: ir.Model, model: PreTrainedModel, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, WeightSource]:
    """Let every initializer that is a parameter wait for its values, under the parameter's name, in place.

    Of tied parameters torch keeps one, by any of their names; it gets the one that `shapes` knows.
    """
    state = model.state_dict(keep_vars=True)
    known = {id(state[name]): name for name in shapes}
    sources = {}
    for name, value in list(traced.graph.initializers.items()):
        parameter = state.get(name.removeprefix("model."))
        if parameter is None:
            continue
        own = known[id(parameter)]
        value.const_value = None
        if own != name:
            value.name = own
        sources[own] = WeightSource((Segment(own, range(parameter.shape[0] if parameter.ndim else 1)),))
    return sources
