"""A and B from int8 codes by standard operators: Cast, times the scales, Reshape.

No DequantizeLinear: onnxruntime does not fold it, and fuses it with the product into MatMulNBits, whose activations are
int8. In a graph whose adapter is built in, all of this is constant and onnxruntime folds it when it opens the model: it
then runs as fast as with floats.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from lora_deploy.adapter.packing import Strip
from lora_deploy.export.sites import constant
from lora_deploy.slots import Slot

__all__ = ["add_int8_matrices"]


def add_int8_matrices(
    model: ir.Model, slot: Slot, rank: int, strips: Sequence[Strip], dtype: ir.DataType
) -> tuple[list[ir.Node], ir.Value, ir.Value]:
    """A (inputs, rank) and B (rank, outputs), computed in float32 from codes and scales.

    Args:
        model: The graph; gets codes and scales as initializers that wait for their values.
        slot: The place of the adapter, with A and B in int8.
        rank: Of the initializers; 0 where each adapter decides it.
        strips: What is stored of B; none where it is stored whole.
        dtype: Of the computation.

    Returns:
        The nodes in order, A and B.
    """
    builder = _Builder(model, slot)
    shapes = slot.input_shapes(rank)
    if strips:
        count = sum(strip.rank * (strip.stop - strip.start) for strip in strips)
        scales = sum(strip.rank * builder.blocks(strip) for strip in strips)
        shapes = (*shapes[:2], (count,), (scales,))
    inputs = []
    for name, shape in zip(slot.input_names, shapes, strict=True):
        is_codes = name.endswith("codes")
        inputs.append(ir.val(name, dtype=ir.DataType.INT8 if is_codes else ir.DataType.FLOAT, shape=shape))
        model.graph.initializers[name] = inputs[-1]
    a = builder.reshape(builder.scaled(*inputs[:2]), [slot.inputs, -1])
    if strips:
        b = builder.join(strips, *inputs[2:])
    else:
        b = builder.reshape(builder.scaled(*inputs[2:]), [-1, slot.outputs])
    matrices = []
    for name, values in zip(slot.matrix_names, (a, b), strict=True):
        if dtype != ir.DataType.FLOAT:
            values = builder.add("Cast", [values], to=int(dtype))
        values.name = name
        matrices.append(values)
    return builder.nodes, matrices[0], matrices[1]


class _Builder:
    """Collects the nodes of one slot."""

    def __init__(self, model: ir.Model, slot: Slot) -> None:
        self.model, self.slot = model, slot
        self.nodes: list[ir.Node] = []

    def add(self, op_type: str, inputs: list[ir.Value], **attributes: int) -> ir.Value:
        name = f"{self.slot.name}.lora_{op_type}_{len(self.nodes)}"
        self.nodes.append(ir.node(op_type, inputs, attributes=attributes, name=name))
        return self.nodes[-1].outputs[0]

    def blocks(self, strip: Strip) -> int:
        """How many scales a row of a strip has."""
        assert self.slot.int8_blocks is not None
        return -(-(strip.stop - strip.start) // self.slot.int8_blocks[1])

    def scaled(self, codes: ir.Value, scales: ir.Value) -> ir.Value:
        return self.add("Mul", [self.add("Cast", [codes], to=int(ir.DataType.FLOAT)), scales])

    def reshape(self, values: ir.Value, shape: Sequence[int]) -> ir.Value:
        target = constant(self.model, f"shape_{'_'.join(map(str, shape))}", shape)
        return self.add("Reshape", [values, target])

    def join(self, strips: Sequence[Strip], codes: ir.Value, scales: ir.Value) -> ir.Value:
        """B from its strips: each between zeros, one below the other."""
        lengths = [strip.rank * (strip.stop - strip.start) for strip in strips]
        counts = [strip.rank * self.blocks(strip) for strip in strips]
        rows = []
        pairs = zip(strips, self.split(codes, lengths), self.split(scales, counts), strict=True)
        for strip, its_codes, its_scales in pairs:
            blocks = self.blocks(strip)
            values = self.scaled(
                self.reshape(its_codes, [strip.rank, blocks, (strip.stop - strip.start) // blocks]),
                self.reshape(its_scales, [strip.rank, blocks, 1]),
            )
            values = self.reshape(values, [strip.rank, strip.stop - strip.start])
            before, after = strip.start, self.slot.outputs - strip.stop
            if before or after:
                padding = constant(self.model, f"padding_{before}_{after}", [0, before, 0, after])
                values = self.add("Pad", [values, padding])
            rows.append(values)
        return self.add("Concat", rows, axis=0) if len(rows) > 1 else rows[0]

    def split(self, values: ir.Value, sizes: list[int]) -> Sequence[ir.Value]:
        if len(sizes) == 1:
            return [values]
        lengths = constant(self.model, f"split_{'_'.join(map(str, sizes))}", sizes)
        name = f"{self.slot.name}.lora_Split_{len(self.nodes)}"
        node = ir.node("Split", [values, lengths], attributes={"axis": 0}, num_outputs=len(sizes), name=name)
        self.nodes.append(node)
        return node.outputs
