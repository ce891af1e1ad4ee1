"""The adapter as a branch beside the base: Add(base, MatMul(MatMul(x, A), B)), with the scaling folded into B."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import onnx_ir as ir
import torch

from lora_deploy.adapter import LoraAdapter
from lora_deploy.adapter.int8 import choose_blocks
from lora_deploy.adapter.packing import Strip, cast_slot, pack_slot, pack_strips, packed_rank
from lora_deploy.export.int8_branch import add_int8_matrices
from lora_deploy.export.sites import LinearSite, Product, constant
from lora_deploy.slots import Slot, SlotPart

__all__ = ["ADAPTER_IDS", "AdapterChoice", "add_branch", "add_slot_inputs", "make_slot", "stream_branches"]

ADAPTER_IDS = "adapter_ids"


def make_slot(site: LinearSite, modules: Mapping[str, str], *, int8: bool) -> Slot:
    """The slot of a site.

    Args:
        site: The linear layers.
        modules: Names of layers that share their weight with another (a tied head), by that other's name.
        int8: Whether A and B are stored as int8 codes.
    """
    parts = []
    for segment in site.source.segments:
        module = segment.parameter.removesuffix(".weight")
        module = modules.get(module, module)
        if isinstance(segment.rows, range):
            parts.append(SlotPart(module=module, rows=(segment.rows.start, segment.rows.stop)))
        else:
            parts.append(SlotPart(module=module, rows=segment.rows, in_order=False))
    outputs, inputs = site.shape
    own = site.name.removesuffix(".weight")
    blocks = choose_blocks(inputs, [len(part.indices()) for part in parts]) if int8 else None
    return Slot(name=modules.get(own, own), inputs=inputs, outputs=outputs, parts=tuple(parts), int8_blocks=blocks)


class AdapterChoice:
    """`adapter_ids` (batch,): which adapter of the pool each row runs with; -1, the default, for none.

    Every row goes through the A of all adapters side by side, and what is not its own is replaced by zero before B.
    Against gathering each row's own A and B this reads every adapter once and copies none.

    Args:
        model: The graph; gets the input.
        count: Adapters in the pool.
        dtype: Of the computation.
    """

    def __init__(self, model: ir.Model, count: int, dtype: ir.DataType) -> None:
        self.model, self.count = model, count
        self.masks: dict[tuple[int, int], ir.Value] = {}
        self.nodes: list[ir.Node] = []
        self.input = constant(model, ADAPTER_IDS, [-1])
        self.input.shape = ir.Shape(["adapter_batch"])
        model.graph.inputs.append(self.input)
        zero = torch.zeros((), dtype=ir.tensor_adapters.to_torch_dtype(dtype))
        self.zero = constant(model, "adapter_zero", zero)

    def mask(self, rank: int, dims: int) -> ir.Value:
        """Whose column it is: (batch, 1, count * rank), or (batch, count * rank) where one token of a text is read."""
        if (rank, dims) not in self.masks:
            suffix = "" if dims == 3 else f"_{dims}d"
            owners = torch.arange(self.count).repeat_interleave(rank).reshape([1] * (dims - 1) + [-1])
            owner = constant(self.model, f"adapter_owner_{rank}{suffix}", owners)
            node = ir.node("Equal", [self._ids(dims, suffix), owner], name=f"adapter_mask_{rank}{suffix}")
            self.nodes.append(node)
            self.masks[rank, dims] = node.outputs[0]
        return self.masks[rank, dims]

    def _ids(self, dims: int, suffix: str) -> ir.Value:
        """The ids as (batch, 1) or (batch, 1, 1)."""
        name = f"adapter_ids.unsqueeze{suffix}"
        made = next((node for node in self.nodes if node.name == name), None)
        if made is None:
            axes = constant(self.model, f"adapter_axes{suffix}", list(range(1, dims)))
            made = ir.node("Unsqueeze", [self.input, axes], name=name)
            self.nodes.append(made)
        return made.outputs[0]

    def select(self, hidden: ir.Value, rank: int, name: str, dims: int = 3) -> ir.Node:
        """What is the row's own adapter's, and zero for the others: a choice, for infinity times zero is no zero."""
        return ir.node("Where", [self.mask(rank, dims), hidden, self.zero], name=name)

    def place(self) -> None:
        """Put the masks' nodes at the beginning of the graph, once all sites have asked for theirs."""
        self.model.graph.insert_before(self.model.graph[0], self.nodes)


def add_branch(
    model: ir.Model,
    site: LinearSite,
    slot: Slot,
    base: Product,
    rank: int | None,
    *,
    choice: AdapterChoice | None = None,
    strips: Sequence[Strip] = (),
) -> Product:
    """The base's product with the slot's branch added.

    Args:
        model: The graph; gets the tensors that hold A and B as initializers that wait for their values.
        site: The linear layers.
        slot: Their slot.
        base: Their product.
        rank: Of the branch; None for a slot whose rank each adapter decides: the initializers then have rank 0.
        choice: Of a pooled graph.
        strips: Of a B in int8 that is built in: what of it is stored.
    """
    dtype = site.linears[0].weight.dtype
    assert dtype is not None
    width = (rank or 0) * (choice.count if choice else 1)
    if slot.int8_blocks is None:
        nodes: list[ir.Node] = []
        a, b = (
            ir.val(name, dtype=dtype, shape=shape)
            for name, shape in zip(slot.input_names, slot.input_shapes(width), strict=True)
        )
        for value in (a, b):
            model.graph.initializers[str(value.name)] = value
    else:
        nodes, a, b = add_int8_matrices(model, slot, width, strips, dtype)
    down = ir.node("MatMul", [site.input, a], name=f"{slot.name}.lora_A")
    nodes = [*base.nodes, *nodes, down]
    hidden = down.outputs[0]
    if choice is not None:
        nodes.append(choice.select(hidden, rank or 0, f"{slot.name}.lora_select", _dims(site)))
        hidden = nodes[-1].outputs[0]
    up = ir.node("MatMul", [hidden, b], name=f"{slot.name}.lora_B")
    add = ir.node("Add", [base.output, up.outputs[0]], name=f"{slot.name}.lora_add")
    return Product((*nodes, up, add), add.outputs[0])


def _dims(site: LinearSite) -> int:
    """Dimensions of what a site reads: 3, or 2 in a head that reads one token of each text."""
    return 3 if site.input.shape is None else len(site.input.shape)


def add_slot_inputs(model: ir.Model, slots: Sequence[Slot]) -> None:
    """Make what holds A and B of every slot optional inputs; call it after every pass that might strip them.

    Their initializers, of rank 0, are what they are when nothing is given: x @ A @ B is then zero, exactly.
    """
    for slot in slots:
        for name, shape in zip(slot.input_names, slot.input_shapes(f"{slot.name}.rank"), strict=True):
            value = model.graph.initializers[name]
            empty = torch.empty([size if isinstance(size, int) else 0 for size in shape], dtype=_torch_dtype(value))
            value.const_value = ir.tensor_adapters.TorchTensor(empty, name=name)
            value.shape = ir.Shape(shape)
            model.graph.inputs.append(value)


def _torch_dtype(value: ir.Value) -> torch.dtype:
    assert value.dtype is not None
    return ir.tensor_adapters.to_torch_dtype(value.dtype)


def stream_branches(
    slots: Sequence[Slot], adapters: Sequence[LoraAdapter], compute_dtype: str
) -> Iterator[tuple[str, torch.Tensor]]:
    """A and B of every slot: of one adapter, or of several side by side, each padded to the largest rank.

    In int8 they are always of one.

    Args:
        slots: Those of the graph.
        adapters: In the order of their ids.
        compute_dtype: Of the graph: "fp32", "fp16" or "bf16".

    Yields:
        Name of the initializer and its values.

    Raises:
        AdapterError: A value is not finite in that type.
    """
    for slot in slots:
        if slot.int8_blocks is not None:
            yield from pack_strips([slot], adapters[0], compute_dtype)
            continue
        rank = max(packed_rank(slot, adapter) for adapter in adapters)
        a = torch.zeros(slot.inputs, len(adapters) * rank)
        b = torch.zeros(len(adapters) * rank, slot.outputs)
        for number, adapter in enumerate(adapters):
            one_a, one_b = pack_slot(slot, adapter)
            start, end = number * rank, number * rank + one_a.shape[1]
            a[:, start:end], b[start:end] = one_a, one_b
        yield from zip(slot.input_names, cast_slot(slot, (a, b), compute_dtype, adapters), strict=True)
