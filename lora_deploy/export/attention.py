"""Attention with the cache in place, for CPUs: `Attention` and its rotations become `GroupQueryAttention`.

`Attention` joins past and new keys and values to new tensors at every step. `GroupQueryAttention` lets
onnxruntime-genai give one buffer that it writes into, turns queries and keys itself, and reads q, k and v from one
product without a Split.

As exporters use it, with `seqlens_k` counted from the mask, it is wrong for rows that are padded on the left. Here
every row is as long as the longest, and an additive bias made of the mask hides the padding, wherever it is. Two things
follow:

- Positions inside the operator are places in the cache. Rotations depend on differences only, so that a row may begin
  anywhere.
- For the first prompt the CPU kernel counts positions from zero and reads none. A row whose positions do not count up
  by one from its first token, as where padding lies between tokens, would be computed wrongly: its logits are NaN.

And it takes several new tokens of several rows in the first prompt only; onnxruntime refuses them later.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import onnx_ir as ir
import torch

from lora_deploy.errors import UsageError
from lora_deploy.export.graph import Graph
from lora_deploy.export.sites import constant

__all__ = ["group_attention"]

# Finite: a row of padding that sees nothing but padding is then an average, not NaN, which its keys would spread.
_HIDDEN = -1e9
_INPUTS = 6  # q, k, v, mask, past key and value: what an Attention node with a cache reads


def group_attention(graph: Graph, *, required: bool = False) -> Graph:
    """Let a lowered graph's attention run in place on a CPU.

    All of its attention or none is replaced: onnxruntime-genai shares the buffers of a model or does not. A graph stays
    as it is where the kernel lacks something: another type than float32, softcapping, a head size that is no multiple
    of 16, attention that is not causal or has no cache or no boolean mask.

    Args:
        graph: From `lower_graph`; its model is changed in place.
        required: Whether it is an error where that cannot be.

    Returns:
        The graph, with what onnxruntime-genai must know of it.

    Raises:
        UsageError: It is required and cannot be.
    """
    model = graph.model
    calls = [node for node in model.graph if node.op_type == "Attention" and node.domain == ""]
    if not calls or not all(_has_kernel(call) for call in calls):
        if required:
            raise UsageError(
                "onnxruntime has no kernel that writes this model's cache in place",
                found=f"--cache in-place, of a {model.graph.name} model",
                expected="causal attention with a cache, heads of a multiple of 16, no softcapping",
                remedy="leave --cache out",
            )
        return graph
    shared = _SharedInputs(model)
    for call in calls:
        _replace(model, call, shared)
    shared.place()
    search = graph.genai_config["search"] | {"past_present_share_buffer": True}
    return replace(graph, genai_config=graph.genai_config | {"search": search})


def _has_kernel(call: ir.Node) -> bool:
    if len(call.inputs) != _INPUTS:
        return False
    mask, past = call.inputs[3], call.inputs[4]
    if mask is None or past is None:
        return False
    head = past.shape[3] if past.shape is not None else None
    return (
        isinstance(head, int)
        and head % 16 == 0
        and past.dtype == ir.DataType.FLOAT
        and mask.dtype in (ir.DataType.BOOL, None)
        and call.attributes.get_int("is_causal", 0) == 1
        and call.attributes.get_int("q_num_heads", 0) > 0  # three dimensions, as the products give them
        and not call.attributes.get_float("softcap", 0.0)
    )


@dataclass(frozen=True)
class _Rotation:
    """`RotaryEmbedding(x, Gather(cos, position_ids), Gather(sin, position_ids))`.

    Attributes:
        node: The RotaryEmbedding.
        tables: cos and sin, (positions, head / 2).
        interleaved: Whether neighbours are turned together, not halves.
    """

    node: ir.Node
    tables: tuple[ir.Value, ir.Value]
    interleaved: int

    @property
    def input(self) -> ir.Value:
        """What is turned."""
        value = self.node.inputs[0]
        assert value is not None
        return value


def _find_rotation(value: ir.Value | None, positions: ir.Value | None) -> _Rotation | None:
    """The rotation that gives a value; None where it is not of the kernel's kind, or something else reads it too."""
    node = value.producer() if value is not None else None
    if node is None or node.op_type != "RotaryEmbedding" or node.domain != "" or len(node.outputs[0].uses()) > 1:
        return None
    if node.attributes.get_int("rotary_embedding_dim", 0) or any(one is not None for one in node.inputs[3:]):
        return None
    tables = []
    for given in node.inputs[1:3]:
        gather = given.producer() if given is not None else None
        if gather is None or gather.op_type != "Gather" or gather.inputs[1] is not positions:
            return None
        assert gather.inputs[0] is not None
        tables.append(gather.inputs[0])
    return _Rotation(node, (tables[0], tables[1]), node.attributes.get_int("interleaved", 0))


def _replace(model: ir.Model, call: ir.Node, shared: _SharedInputs) -> None:
    query, key, value, mask, past_key, past_value = call.inputs[:_INPUTS]
    assert mask is not None
    rotations = [_find_rotation(one, shared.positions) for one in (query, key)]
    attributes: dict[str, int | float] = {
        "num_heads": call.attributes.get_int("q_num_heads"),
        "kv_num_heads": call.attributes.get_int("kv_num_heads"),
    }
    if "scale" in call.attributes:
        attributes["scale"] = call.attributes.get_float("scale")
    turned: list[ir.Value | None] = [None, None, None]
    gone: list[ir.Node] = []
    first, second = rotations
    if first and second and first.tables == second.tables and first.interleaved == second.interleaved:
        attributes |= {"do_rotary": 1, "rotary_interleaved": first.interleaved}
        query, key = first.input, second.input
        turned = [*first.tables, shared.slots()]
        gone += [first.node, second.node]
    split = _packed(query, key, value, [call, *gone])
    if split is not None:
        query, key, value = split.inputs[0], None, None
        gone.append(split)
    bias = shared.bias(mask, call, checked=turned[2] is not None)
    node = ir.node(
        "GroupQueryAttention",
        [query, key, value, past_key, past_value, shared.lengths, shared.total, *turned, bias],
        attributes=attributes,
        domain="com.microsoft",
        num_outputs=3,
        name=call.name,
    )
    ir.convenience.replace_nodes_and_values(model.graph, call, [call], [node], call.outputs, node.outputs)
    _remove(model, gone)


def _remove(model: ir.Model, nodes: list[ir.Node]) -> None:
    """Remove nodes that nothing reads any more, and what only they read: tables of rotations, widths of a Split."""
    gathers = {
        value.producer() for node in nodes if node.op_type == "RotaryEmbedding" for value in node.inputs[1:] if value
    }
    constants = {value for node in nodes if node.op_type == "Split" for value in node.inputs[1:] if value}
    for node in nodes:
        model.graph.remove(node, safe=True)
    for value in constants:
        if not value.uses():
            model.graph.initializers.pop(str(value.name), None)
    for gather in gathers:
        if gather is not None and not gather.outputs[0].uses():
            model.graph.remove(gather, safe=True)


def _packed(
    query: ir.Value | None, key: ir.Value | None, value: ir.Value | None, readers: list[ir.Node]
) -> ir.Node | None:
    """The Split that gives q, k and v, if nothing else reads what it gives: the kernel takes them joined."""
    split = query.producer() if query is not None else None
    if split is None or split.op_type != "Split" or list(split.outputs) != [query, key, value]:
        return None
    return split if all(use.node in readers for output in split.outputs for use in output.uses()) else None


class _SharedInputs:
    """What all the attention of a graph reads: lengths, positions and biases, made once.

    Args:
        model: The graph, with the inputs `input_ids` (batch, new), `attention_mask` (batch, all) and, if it has
            positions, `position_ids` (batch, new).
    """

    def __init__(self, model: ir.Model) -> None:
        self._model = model
        inputs = {value.name: value for value in model.graph.inputs}
        self._ids, self._mask = inputs["input_ids"], inputs["attention_mask"]
        self.positions = inputs.get("position_ids")
        self._nodes: list[ir.Node] = []
        self._biases: dict[tuple[ir.Value, bool], ir.Value] = {}
        self._seen: ir.Value | None = None
        self._slots: ir.Value | None = None
        self._all = self._add("Shape", [self._mask], start=1, end=2)
        total = self._add("Cast", [self._all], to=ir.DataType.INT32)
        self.total = self._add("Squeeze", [total])
        last = self._add("Sub", [total, self._constant("one", torch.ones(1, dtype=torch.int32))])
        self.lengths = self._add("Expand", [last, self._add("Shape", [self._mask], start=0, end=1)])

    def slots(self) -> ir.Value:
        """(batch, new): the place of each token in its row of the cache, or zero for the first prompt."""
        if self._slots is None:
            assert self.positions is not None
            begin = self._add("ArgMax", [self._mask], axis=1, keepdims=1)
            self._moved = self._add("Add", [self.positions, begin])
            self._new = self._add("Shape", [self._ids], start=1, end=2)
            self._first = self._add("Equal", [self._all, self._new])
            self._slots = self._add("Where", [self._first, self._constant("nowhere", [0]), self._moved])
        return self._slots

    def bias(self, mask: ir.Value, reader: ir.Node, *, checked: bool) -> ir.Value:
        """(batch, 1, new, all): what is added to the scores, 0 or so little that nothing of it is left.

        Args:
            mask: (batch, 1, new, all): what may be seen.
            reader: The attention that reads it.
            checked: Whether a first prompt with positions that the kernel does not count gives NaN.
        """
        if (mask, checked) not in self._biases:
            seen = self._checked() if checked else self._constant("seen", torch.zeros(()))
            hidden = self._constant("hidden", torch.tensor(_HIDDEN))
            node = ir.node("Where", [mask, seen, hidden], name=f"attention.bias_{len(self._biases)}")
            self._model.graph.insert_before(reader, node)
            self._biases[mask, checked] = node.outputs[0]
        return self._biases[mask, checked]

    def _checked(self) -> ir.Value:
        """(batch, 1, 1, 1): 0, or NaN for a row whose first prompt has other positions than the kernel counts."""
        if self._seen is None:
            self._seen = self._check_positions()
        return self._seen

    def _check_positions(self) -> ir.Value:
        since, end = self._add("Neg", [self._new]), self._constant("end", [torch.iinfo(torch.int64).max])
        real = self._add("Slice", [self._mask, since, end, self._constant("tokens", [1])])
        nothing, one = self._constant("start", torch.tensor(0)), self._constant("step", torch.tensor(1))
        places = self._add("Range", [nothing, self._add("Squeeze", [self._new]), one])
        off = self._add("Mul", [real, self._add("Sub", [self._moved, places])])
        most = self._add("ReduceMax", [self._add("Abs", [off]), self._constant("tokens", [1])], keepdims=1)
        wrong = self._add("And", [self._first, self._add("Cast", [most], to=ir.DataType.BOOL)])
        nan, zero = self._constant("nan", torch.tensor(torch.nan)), self._constant("seen", torch.zeros(()))
        row = self._add("Where", [wrong, nan, zero])
        return self._add("Unsqueeze", [row, self._constant("heads", [2, 3])])

    def _constant(self, name: str, values: list[int] | torch.Tensor) -> ir.Value:
        return constant(self._model, f"attention.{name}", values)

    def _add(self, operator: str, inputs: list[ir.Value], **attributes: int | ir.DataType) -> ir.Value:
        name = f"attention.{operator}_{len(self._nodes)}"
        self._nodes.append(ir.node(operator, inputs, attributes=attributes, name=name))
        return self._nodes[-1].outputs[0]

    def place(self) -> None:
        """Put the nodes at the beginning of the graph."""
        self._model.graph.insert_before(self._model.graph[0], self._nodes)
