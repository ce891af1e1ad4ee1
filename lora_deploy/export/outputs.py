"""What an adapter does to the outputs of a layer, beside its weight: DoRA's factor on each, and the bias of B."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir
import torch
from onnx_ir import tensor_adapters

from lora_deploy.adapter import LoraAdapter
from lora_deploy.adapter.packing import cast_branch
from lora_deploy.export.merge import MergedParameters
from lora_deploy.export.sites import LinearSite, Product

__all__ = ["OutputChange", "OutputChanges", "stream_output_changes"]


@dataclass(frozen=True)
class OutputChange:
    """A vector over the outputs of a site.

    Attributes:
        name: Of its initializer, (out,).
        kind: "scale" is multiplied by, "offset" is added.
        parts: Layers and which of their outputs, in the site's order.
    """

    name: str
    kind: Literal["scale", "offset"]
    parts: tuple[tuple[str, range | tuple[int, ...]], ...]


class OutputChanges:
    """Adds the nodes for what an adapter does to outputs.

    Args:
        adapter: One that is merged or built in.
        tied: Layers that share their weight with another, by that other's name.
        beside: Whether A and B stand beside the weight: DoRA's factor is then a node, else it is in the weight.
    """

    def __init__(self, adapter: LoraAdapter, tied: Mapping[str, str], *, beside: bool) -> None:
        self._adapter, self._tied = adapter, tied
        self._kinds: list[Literal["scale", "offset"]] = []
        if adapter.config.use_dora and beside:
            self._kinds.append("scale")
        if adapter.config.lora_bias:
            self._kinds.append("offset")
        self.made: list[OutputChange] = []

    def add(self, model: ir.Model, site: LinearSite, product: Product) -> Product:
        """The product, scaled and moved as the adapter says; as it is where that is not at all.

        Args:
            model: The graph; gets the vectors as initializers that wait for their values.
            site: The linear layers.
            product: Base and branch together, without the layers' own biases.
        """
        parts = tuple((self._module(segment.parameter), segment.rows) for segment in site.source.segments)
        if not any(module in self._adapter.updates for module, _ in parts):
            return product
        for kind in self._kinds:
            name = f"{site.name.removesuffix('.weight')}.lora_{kind}"
            vector = ir.val(name, dtype=site.linears[0].weight.dtype, shape=(site.shape[0],))
            model.graph.initializers[name] = vector
            node = ir.node("Mul" if kind == "scale" else "Add", [product.output, vector], name=f"{name}_node")
            product = Product((*product.nodes, node), node.outputs[0])
            self.made.append(OutputChange(name, kind, parts))
        return product

    def _module(self, parameter: str) -> str:
        module = parameter.removesuffix(".weight")
        return self._tied.get(module, module)


def stream_output_changes(
    model: ir.Model, changes: Sequence[OutputChange], adapter: LoraAdapter, parameters: MergedParameters
) -> Iterator[tuple[str, torch.Tensor]]:
    """The values of the vectors, one weight of the base in memory at a time.

    Args:
        model: The graph.
        changes: Its vectors.
        adapter: As it is built in.
        parameters: Reads the base.

    Yields:
        Name of the initializer and its values.

    Raises:
        AdapterError: A value is not finite in the type of the graph.
    """
    names = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
    for change in changes:
        dtype = model.graph.initializers[change.name].dtype
        assert dtype is not None
        compute_dtype = names[tensor_adapters.to_torch_dtype(dtype)]
        end = "lora_magnitude_vector" if change.kind == "scale" else "lora_B.bias"
        parts = []
        for module, rows in change.parts:
            values = _part(change.kind, module, rows, adapter, parameters)
            parts.append(cast_branch(values, compute_dtype, f"{module}.{end}", adapter.source))
        yield change.name, torch.cat(parts)


def _part(
    kind: str, module: str, rows: range | tuple[int, ...], adapter: LoraAdapter, parameters: MergedParameters
) -> torch.Tensor:
    if module not in adapter.updates:
        return torch.ones(len(rows)) if kind == "scale" else torch.zeros(len(rows))
    update = adapter.updates[module]
    if kind == "offset":
        values = update.scaled_bias()
    else:
        linear = parameters.base.linears.get(module)
        turned = linear is not None and linear.is_conv1d
        own = parameters.read(f"{module}.weight", transposed=turned)
        values = update.row_scale(own.to(torch.float32, copy=True))
    assert values is not None
    return values[list(rows)]
