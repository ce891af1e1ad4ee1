"""What mobius leaves out of its graphs, or gets wrong, put right as transformers has it.

Found by comparing tiny random models of every family and variant with transformers (`tests/families.py`). What cannot
be put right in the graph goes through the other source of graphs: `lora_deploy.export.source` decides.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
import torch
from transformers import PreTrainedConfig

__all__ = ["correct_graph", "layer_windows"]

_GEMMA = ("gemma2", "gemma3_text")
# torch.nn.LayerNorm's own, which OPT takes: its configuration has no field for it, and mobius assumes 1e-6.
_OPT_EPSILON = 1e-5


def layer_windows(config: PreTrainedConfig) -> list[int | None]:
    """How many tokens each layer looks back over, itself included; None for all of them.

    Args:
        config: Of the transformers model. Where it names no kinds of layers, its window is that of every layer.
    """
    window = getattr(config, "sliding_window", None)
    kinds: Sequence[str] | None = getattr(config, "layer_types", None)
    if kinds is None:
        return [window if getattr(config, "use_sliding_window", True) else None] * config.num_hidden_layers
    return [window if kind == "sliding_attention" else None for kind in kinds]


def correct_graph(model: ir.Model, config: PreTrainedConfig) -> None:
    """Put a graph of mobius right, in place.

    - Sliding windows: the default graph has none, and Gemma's are of the wrong layers (Gemma 2) or count tokens where
      transformers counts places, padding included (both), which differs after padding on the right. Every layer gets a
      mask of its own kind.
    - Gemma's attention: mobius leaves `query_pre_attn_scalar` of Gemma 3 out.
    - Gemma's embedding is scaled by the square root of the hidden size; mobius rounds it to two decimals or to float16.
    - OPT's epsilon.

    Args:
        model: As mobius built it.
        config: Of the transformers model.
    """
    windows = layer_windows(config)
    is_gemma = config.model_type in _GEMMA
    if is_gemma or any(windows):
        _set_masks(model, windows)
    if is_gemma:
        for node in _attention_nodes(model):
            node.attributes.add(ir.AttrFloat32("scale", config.query_pre_attn_scalar**-0.5))
        _scale_embedding(model, math.sqrt(config.hidden_size))
    if config.model_type == "opt":
        for node in model.graph:
            if "epsilon" in node.attributes:
                node.attributes.add(ir.AttrFloat32("epsilon", _OPT_EPSILON))


def _attention_nodes(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph if node.op_type == "Attention" and node.domain == ""]


def _set_masks(model: ir.Model, windows: Sequence[int | None]) -> None:
    """Let every Attention node be causal and read a boolean mask of its layer's window."""
    nodes = _attention_nodes(model)
    if len(nodes) != len(windows):
        raise ValueError(f"{len(nodes)} Attention nodes for {len(windows)} layers")
    masks = _Masks(model)
    for node, window in zip(nodes, windows, strict=True):
        node.replace_input_with(3, masks.of(window))
        node.attributes.add(ir.AttrInt64("is_causal", 1))
    ir.passes.common.RemoveUnusedNodesPass()(model)
    model.graph.sort()


class _Masks:
    """Boolean masks (batch, 1, new, total), True where a token may be looked at, of padding and of a window.

    A window counts places, padding included, as transformers does: the token at place q looks at the places k of
    q - window < k <= q. The right side of it is left to the Attention node's own `is_causal`.
    """

    def __init__(self, model: ir.Model) -> None:
        self._graph = model.graph
        self._made: dict[int | None, ir.Value] = {}
        inputs = {value.name: value for value in model.graph.inputs}
        mask, ids = inputs["attention_mask"], inputs["input_ids"]
        self._total = self._node("Shape", [mask], {"start": 1, "end": 2})
        self._new = self._node("Shape", [ids], {"start": 1, "end": 2})
        tokens = self._node("Cast", [mask], {"to": ir.DataType.BOOL.value})
        self._tokens = self._node("Unsqueeze", [tokens, self._int([1, 2])])

    def of(self, window: int | None) -> ir.Value:
        """The mask of one kind of layer, made once."""
        if window not in self._made:
            self._made[window] = self._full() if window is None else self._sliding(window)
        return self._made[window]

    def _full(self) -> ir.Value:
        one = self._int([1])
        shape = self._node("Concat", [one, one, self._new, one], {"axis": 0})
        return self._node("Expand", [self._tokens, shape], name="mask")

    def _sliding(self, window: int) -> ir.Value:
        zero, one = self._int(0), self._int(1)
        total = self._node("Squeeze", [self._total])
        past = self._node("Sub", [total, self._node("Squeeze", [self._new])])
        keys = self._node("Range", [zero, total, one])
        queries = self._node("Unsqueeze", [self._node("Range", [past, total, one]), self._int([1])])
        distance = self._node("Sub", [queries, keys])
        near = self._node("Less", [distance, self._int(window)])
        return self._node("And", [self._tokens, near], name="mask")

    def _int(self, value: int | list[int]) -> ir.Value:
        name = f"masks.int_{value}".replace("[", "list_").replace(", ", "_").rstrip("]")
        if name not in self._graph.initializers:
            tensor = ir.tensor(torch.tensor(value, dtype=torch.int64).numpy(), name=name)
            self._graph.register_initializer(ir.val(name, const_value=tensor))
        return self._graph.initializers[name]

    def _node(
        self, kind: str, inputs: Sequence[ir.Value], attributes: dict[str, Any] | None = None, name: str = ""
    ) -> ir.Value:
        node = ir.node(kind, inputs, attributes)
        node.name = f"masks/{name or kind}_{len(self._graph)}"
        node.outputs[0].name = f"{node.name}.output"
        self._graph.append(node)
        return node.outputs[0]


def _scale_embedding(model: ir.Model, factor: float) -> None:
    """Let the product behind the embedding of the tokens be with this factor."""
    (ids,) = [value for value in model.graph.inputs if value.name == "input_ids"]
    (embedding,) = [node for node in ids.consumers() if node.op_type == "Gather"]
    (scaling,) = [node for node in embedding.outputs[0].consumers() if node.op_type == "Mul"]
    old = scaling.inputs[1]
    assert old is not None
    assert old.dtype is not None
    tensor = ir.tensor(torch.tensor(factor).numpy(), name="embedding_scale")
    if old.dtype != ir.DataType.FLOAT:
        tensor = ir.tensor(torch.tensor(factor).numpy().astype(old.dtype.numpy()), name="embedding_scale")
    value = ir.val("embedding_scale", const_value=tensor)
    model.graph.register_initializer(value)
    scaling.replace_input_with(1, value)
