"""Linear layers, embedding and output head whose merged weights become codes again (MatMulNBits)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, cast

import onnx_ir as ir
import torch

from lora_deploy.adapter import LoraAdapter, LoraUpdate
from lora_deploy.config import LoraConfig
from lora_deploy.export.coded import CodedBase, initializer_shapes
from lora_deploy.export.graph import WeightSource
from lora_deploy.export.sites import constant
from lora_deploy.manifest import CodedWeight, StoredModule
from lora_deploy.quantization.base import TrainingBase
from lora_deploy.requantize.options import Grid

__all__ = ["RequantizedBase", "correction_shapes", "lower_embedding"]


@dataclass(frozen=True)
class RequantizedBase(CodedBase):
    """How the products of merged weights are built that become codes.

    Attributes:
        grids: Bits and block size of each layer that does, by name.
    """

    requantized = True
    grids: Mapping[str, Grid] = field(default_factory=dict)

    def scheme_of(self, module: str) -> str:
        """ "int4", "int8", or "none" for a layer that stays in floats."""
        return f"int{self.grids[module][0]}" if module in self.grids else "none"

    def _kind(self, module: str) -> tuple[str, str, int]:
        return self.scheme_of(module), "", self._blocksize(module)

    def _blocksize(self, module: str) -> int:
        return self.grids[module][1] if module in self.grids else 0

    def _ends_whole(self, module: str) -> bool:
        return module in self.grids


def lower_embedding(
    model: ir.Model, base: RequantizedBase, sources: Mapping[str, WeightSource], coded: Sequence[CodedWeight]
) -> list[CodedWeight]:
    """Let the lookup of token embeddings read codes, those of the output head where it shares them; in place.

    Args:
        model: The graph, its linear layers lowered.
        base: Says whether the embedding becomes codes.
        sources: Where each initializer gets its values.
        coded: The products.

    Returns:
        What is stored for it, if it is not stored for the head.
    """
    found = _find_embedding(model, sources)
    if found is None or base.scheme_of(found[1]) == "none":
        return []
    gather, module = found
    weight = next((one for one in coded if [stored.name for stored in one.modules] == [module]), None)
    added = []
    if weight is None:
        weight = CodedWeight(
            operator="GatherBlockQuantized",
            scheme=cast(Literal["int4", "int8"], base.scheme_of(module)),
            blocksize=base.grids[module][1],
            codes=f"{module}.weight.codes",
            scales=f"{module}.weight.scales",
            output=f"{module}.lookup",
            modules=(StoredModule(name=module, shape=base.shape_of(module)),),
            exact=False,
            requantized=True,
        )
        shapes = initializer_shapes(weight)
        for name, dtype, shape in zip(
            (weight.codes, weight.scales), (ir.DataType.UINT8, base.dtype), shapes, strict=True
        ):
            model.graph.initializers[name] = ir.val(name, dtype=dtype, shape=shape)
        added.append(weight)
    codes, scales = (model.graph.initializers[name] for name in (weight.codes, weight.scales))
    # The product wants its codes in blocks, the lookup in rows.
    rows = constant(model, f"{module}.rows", [weight.shape[0], -1])
    flat = ir.node("Reshape", [codes, rows], name=f"{module}.codes_in_rows")
    bits = 4 if weight.scheme == "int4" else 8
    attributes = {"bits": bits, "block_size": weight.blocksize, "gather_axis": 0, "quantize_axis": 1}
    lookup = ir.node(
        "GatherBlockQuantized",
        [flat.outputs[0], gather.inputs[1], scales],
        attributes=attributes,
        domain="com.microsoft",
        name=f"{module}.lookup",
    )
    old = gather.inputs[0]
    ir.convenience.replace_nodes_and_values(
        model.graph, gather, [gather], [flat, lookup], gather.outputs, lookup.outputs
    )
    if old is not None and not old.uses():
        model.graph.initializers.pop(str(old.name), None)
    return added


def _find_embedding(model: ir.Model, sources: Mapping[str, WeightSource]) -> tuple[ir.Node, str] | None:
    """The node that looks the input's tokens up, and the layer that it reads."""
    for node in model.graph:
        if node.op_type == "Gather" and node.inputs[1] is not None and node.inputs[1].name == "input_ids":
            source = sources.get(str(node.inputs[0].name)) if node.inputs[0] is not None else None
            if source is not None and len(source.segments) == 1:
                return node, source.segments[0].parameter.removesuffix(".weight")
    return None


def correction_shapes(base: TrainingBase, grids: Mapping[str, Grid], rank: int) -> LoraAdapter:
    """The correction before it is known: an adapter whose tensors have shapes only."""
    updates = {}
    for name in grids:
        if name in base.linears:
            rows, columns = base.linears[name].shape
            own = min(rank, rows, columns)
            meta = torch.device("meta")
            updates[name] = LoraUpdate(torch.empty(own, columns, device=meta), torch.empty(rows, own, device=meta), 1.0)
    return LoraAdapter(LoraConfig(r=rank, lora_alpha=rank), updates, source="the correction")
