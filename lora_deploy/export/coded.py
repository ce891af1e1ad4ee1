"""Linear layers whose weight stays as codes in the graph: the training base's own, bit for bit, or 8-bit ones."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, cast

import onnx_ir as ir
import torch

from lora_deploy.codes import pair_table
from lora_deploy.export.graph import Segment, WeightSource
from lora_deploy.export.pipeline import Job, Parts, in_order
from lora_deploy.export.scales import cast_scales
from lora_deploy.export.sites import LinearSite, Product, constant, matmul_transposed
from lora_deploy.manifest import CodedWeight, StoredModule
from lora_deploy.quantization import QuantizedWeight
from lora_deploy.quantization.affine import AffineWeight, affine_blocksize, to_affine8
from lora_deploy.quantization.base import TrainingBase
from lora_deploy.quantization.hashes import hash_tensors
from lora_deploy.quantization.weight import Blockwise4BitWeight, Int8Weight

__all__ = ["CodedBase", "decode", "encode", "initializer_shapes", "stream_codes"]

_LARGEST_BNB4_BLOCK = 256  # of MatMulBnb4; a larger block's absmax is repeated, which changes no value


@dataclass(frozen=True)
class CodedBase:
    """How the products of a quantized base are built.

    Attributes:
        base: The training base.
        precision: What the codes become: the base's own scheme, or "int8".
        expand: Dequantize by standard operators, which onnxruntime folds when it opens the model.
        dtype: Of the computation.
        accuracy_level: MatMulNBits' (0: activations stay float; 4: they are rounded to int8).
        whole: Layers that an adapter trained whole: their codes are not what was trained any more.
        requantized: Whether the codes are made anew, of the merged weights.
    """

    requantized = False

    base: TrainingBase
    precision: str
    expand: bool
    dtype: ir.DataType
    accuracy_level: int = 0
    whole: frozenset[str] = frozenset()

    def scheme_of(self, module: str) -> str:
        """ "nf4", "fp4", "int8", or "none" for a layer whose weight is not kept as codes."""
        if module not in self.base.linears or module in self.whole:
            return "none"
        own, _ = self.base.codes_of(module)
        return "int8" if own != "none" and self.precision == "int8" else own

    def product(
        self, model: ir.Model, site: LinearSite, sources: dict[str, WeightSource]
    ) -> tuple[Product, list[CodedWeight]]:
        """The site's product, from whole layers in the order in which the site first names them.

        Layers of one scheme whose codes end with a block are one product; the rest is put side by side, and rows that a
        checkpoint stores in another order are picked out afterwards. The codes themselves never move.

        Args:
            model: The graph; gets the initializers.
            site: The linear layers.
            sources: Gets the sources of the weights that are dense.
        """
        parameters = list(dict.fromkeys(segment.parameter for segment in site.source.segments))
        nodes: list[ir.Node] = []
        outputs: list[ir.Value] = []
        coded: list[CodedWeight] = []
        for run in self._runs(parameters):
            if self.scheme_of(_module(run[0])) == "none":
                product = self._dense(model, site, run[0], sources)
            else:
                weight, product = self._coded(model, site, [_module(name) for name in run], whole=run == parameters)
                coded.append(weight)
            nodes += product.nodes
            outputs.append(product.output)
        if len(outputs) > 1:
            nodes.append(ir.node("Concat", outputs, attributes={"axis": -1}, name=f"{site.name}.concat"))
            outputs = list(nodes[-1].outputs)
        order = self._order(parameters, site.source.segments)
        if order is not None:
            index = constant(model, f"{site.name}.order", order)
            nodes.append(ir.node("Gather", [outputs[0], index], attributes={"axis": -1}, name=f"{site.name}.rows"))
            outputs = list(nodes[-1].outputs)
        return Product(tuple(nodes), outputs[0]), coded

    def _runs(self, parameters: list[str]) -> list[list[str]]:
        """Neighbours whose codes can be one initializer."""
        runs: list[list[str]] = []
        for name in parameters:
            last = _module(runs[-1][-1]) if runs else None
            if last is not None and self._kind(_module(name)) == self._kind(last) and self._ends_whole(last):
                runs[-1].append(name)
            else:
                runs.append([name])
        return runs

    def _kind(self, module: str) -> tuple[str, str, int]:
        """What layers must have in common: what their codes become, what they are, and their block size."""
        own, _ = self.base.codes_of(module) if module in self.base.linears else ("none", 0)
        scheme = self.scheme_of(module)
        return scheme, own, 0 if scheme == "none" else self._blocksize(module)

    def _ends_whole(self, module: str) -> bool:
        scheme, _, blocksize = self._kind(module)
        rows, columns = self.base.linears[module].shape if module in self.base.linears else (0, 0)
        return scheme == "int8" or (scheme != "none" and rows * columns % blocksize == 0)

    def _blocksize(self, module: str) -> int:
        """Of the initializers."""
        columns = self.shape_of(module)[1]
        own, blocksize = self.base.codes_of(module)
        if self.scheme_of(module) != "int8":
            return blocksize if self.expand else min(blocksize, _LARGEST_BNB4_BLOCK)
        return columns if self.expand else affine_blocksize(own, columns, blocksize)

    def _order(self, parameters: list[str], segments: Sequence[Segment]) -> list[int] | None:
        """Where each output of the site is among those of the whole layers; None where they are in place."""
        starts, total = {}, 0
        for name in parameters:
            starts[name] = total
            total += self._rows(name)
        order = [starts[segment.parameter] + row for segment in segments for row in segment.rows]
        return None if order == list(range(total)) else order

    def shape_of(self, module: str) -> tuple[int, int]:
        """(out, in) of a linear layer, or of an output head."""
        if module in self.base.linears:
            return self.base.linears[module].shape
        rows, columns = self.base.shapes[f"{module}.weight"]
        return rows, columns

    def _rows(self, parameter: str) -> int:
        return self.shape_of(_module(parameter))[0]

    def _dense(self, model: ir.Model, site: LinearSite, parameter: str, sources: dict[str, WeightSource]) -> Product:
        shape = (self._rows(parameter), site.shape[1])
        name = f"{site.name}.{parameter}"
        weight = ir.val(name, dtype=self.dtype, shape=shape)
        model.graph.initializers[name] = weight
        sources[name] = WeightSource((Segment(parameter, range(shape[0])),), site.source.transposed)
        return matmul_transposed(site.input, weight, f"{name}.product")

    def _coded(
        self, model: ir.Model, site: LinearSite, modules: list[str], *, whole: bool
    ) -> tuple[CodedWeight, Product]:
        scheme = cast(Literal["nf4", "fp4", "int8", "int4"], self.scheme_of(modules[0]))
        operator: Literal["MatMulBnb4", "MatMulNBits", "expand"]
        operator = "expand" if self.expand else "MatMulNBits" if scheme in ("int8", "int4") else "MatMulBnb4"
        name = site.name if whole else f"{site.name}.{modules[0]}"
        weight = CodedWeight(
            operator=operator,
            scheme=scheme,
            blocksize=self._blocksize(modules[0]),
            codes=f"{name}.weight.codes",
            scales=f"{name}.weight.{'scales' if scheme in ('int8', 'int4') else 'absmax'}",
            output=f"{name}.weight" if self.expand else f"{name}.product",
            modules=tuple(StoredModule(name=module, shape=self.shape_of(module)) for module in modules),
            exact=not self.requantized and scheme == self.base.codes_of(modules[0])[0],
            requantized=self.requantized,
            accuracy_level=self.accuracy_level if operator == "MatMulNBits" else 0,
        )
        codes_shape, scales_shape = initializer_shapes(weight)
        is_signed = operator == "expand" and scheme == "int8"
        codes = ir.val(weight.codes, dtype=ir.DataType.INT8 if is_signed else ir.DataType.UINT8, shape=codes_shape)
        scales_dtype = ir.DataType.FLOAT if self.expand else self.dtype
        scales = ir.val(weight.scales, dtype=scales_dtype, shape=scales_shape)
        for value in (codes, scales):
            model.graph.initializers[str(value.name)] = value
        if self.expand:
            return weight, _expand(model, site.input, codes, scales, weight, self.dtype)
        return weight, self._operator(site.input, codes, scales, weight)

    def _operator(self, x: ir.Value, codes: ir.Value, scales: ir.Value, weight: CodedWeight) -> Product:
        rows, columns = weight.shape
        attributes = {"N": rows, "K": columns, "block_size": weight.blocksize}
        if weight.operator == "MatMulBnb4":
            attributes["quant_type"] = int(weight.scheme == "nf4")
        else:
            attributes |= {"bits": 4 if weight.scheme == "int4" else 8, "accuracy_level": self.accuracy_level}
        node = ir.node(
            weight.operator, [x, codes, scales], attributes=attributes, domain="com.microsoft", name=weight.output
        )
        node.outputs[0].name = weight.output
        return Product((node,), node.outputs[0])


def _module(parameter: str) -> str:
    return parameter.removesuffix(".weight")


def initializer_shapes(weight: CodedWeight) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of the initializers for codes and scales."""
    rows, columns = weight.shape
    if weight.requantized:
        blocks = -(-columns // weight.blocksize)
        return (rows, blocks, weight.blocksize * (4 if weight.scheme == "int4" else 8) // 8), (rows, blocks)
    if weight.scheme == "int8":
        if weight.operator == "expand":
            return (rows, columns), (rows, 1)
        blocks = -(-columns // weight.blocksize)
        return (rows, blocks, weight.blocksize), (rows * blocks,)
    blocks = -(-rows * columns // weight.blocksize)
    if weight.operator == "expand":
        return (blocks * weight.blocksize // 2,), (blocks, 1)
    return (-(-rows * columns // 2),), (blocks,)


def _expand(
    model: ir.Model, x: ir.Value, codes: ir.Value, scales: ir.Value, weight: CodedWeight, dtype: ir.DataType
) -> Product:
    """The weight by standard operators, in float32 as bitsandbytes has it, then x @ W.T."""
    rows, columns = weight.shape
    nodes: list[ir.Node] = []

    def add(op_type: str, inputs: list[ir.Value], **attributes: int | list[int]) -> ir.Value:
        nodes.append(ir.node(op_type, inputs, attributes=attributes, name=f"{weight.output}.{op_type}_{len(nodes)}"))
        return nodes[-1].outputs[0]

    if weight.scheme == "int8":
        values = add("Mul", [add("Cast", [codes], to=int(ir.DataType.FLOAT)), scales])
    else:
        table = constant(model, f"{weight.scheme}_pairs", torch.tensor(pair_table(weight.scheme)))
        pairs = add("Gather", [table, add("Cast", [codes], to=int(ir.DataType.INT32))])
        shape = constant(model, f"blocks_of_{weight.blocksize}", [-1, weight.blocksize])
        values = add("Mul", [add("Reshape", [pairs, shape]), scales])
        if rows * columns % weight.blocksize:
            flat = add("Reshape", [values, constant(model, "flat", [-1])])
            end = constant(model, f"end_{rows * columns}", [rows * columns])
            values = add("Slice", [flat, constant(model, "start_0", [0]), end])
        values = add("Reshape", [values, constant(model, f"shape_{rows}_{columns}", [rows, columns])])
    if dtype != ir.DataType.FLOAT:
        values = add("Cast", [values], to=int(dtype))
    values.name, values.type, values.shape = weight.output, ir.TensorType(dtype), ir.Shape((rows, columns))
    product = add("MatMul", [x, add("Transpose", [values], perm=[1, 0])])
    return Product(tuple(nodes), product)


def encode(weight: QuantizedWeight, coded: CodedWeight) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of one layer as the initializers hold them, flat; scales in float32.

    Args:
        weight: The layer's weight.
        coded: What it becomes.
    """
    if coded.scheme == "int8":
        if coded.operator == "expand" and isinstance(weight, Int8Weight):
            return weight.codes.reshape(-1), weight.row_absmax.float() / 127
        affine = to_affine8(weight)
        return affine.packed().reshape(-1), affine.scales.reshape(-1)
    assert isinstance(weight, Blockwise4BitWeight)
    repeat = weight.blocksize // coded.blocksize
    absmax = weight.absmax if repeat == 1 else weight.absmax.repeat_interleave(repeat)
    count = weight.shape[0] * weight.shape[1]
    return weight.codes, absmax[: -(-count // coded.blocksize)]


def decode(codes: torch.Tensor, scales: torch.Tensor, coded: CodedWeight, shape: tuple[int, int]) -> torch.Tensor:
    """The float32 values (out, in) of one layer from what the initializers hold.

    Args:
        codes: The layer's, flat.
        scales: The layer's, flat.
        coded: Where they are.
        shape: (out, in).
    """
    rows, columns = shape
    scales = scales.float()
    if coded.requantized:
        bits = 4 if coded.scheme == "int4" else 8
        return AffineWeight.from_packed(codes, scales, shape, coded.blocksize, bits).dequantize()
    if coded.scheme != "int8":
        return Blockwise4BitWeight(codes, scales, shape, coded.scheme, coded.blocksize).dequantize()
    if coded.operator == "expand":
        return codes.view(shape).float() * scales[:, None]
    return AffineWeight(codes.view(rows, -1), scales.view(rows, -1), columns, coded.blocksize).dequantize()


def stream_codes(
    model: ir.Model, coded: Sequence[CodedWeight], base: TrainingBase, hashes: dict[str, str]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Codes and scales of every product, several at a time.

    Args:
        model: The graph; tells the types.
        coded: The products.
        base: The training base.
        hashes: Gets the hash of each layer's quantized weight, by name.

    Yields:
        Name of the initializer and values of it, one part after the other.

    Raises:
        InputError: A scale is too large or too small for the type of the computation.
    """
    jobs = (
        Job(math.prod(weight.shape), partial(_make_codes, model, weight, base, hashes))
        for weight in coded
        if not weight.requantized
    )
    yield from in_order(jobs)


def _make_codes(model: ir.Model, weight: CodedWeight, base: TrainingBase, hashes: dict[str, str]) -> Parts:
    all_codes: Parts = []
    all_scales: Parts = []
    missing = math.prod(initializer_shapes(weight)[0])
    for module in weight.modules:
        stored = base.weight(module.name)
        hashes[module.name] = hash_tensors([(module.name, list(stored.stored()))])
        codes, scales = encode(stored, weight)
        scales = cast_scales(scales, _dtype_of(model, weight.scales), f"{module.name}.weight", base)
        all_codes.append((weight.codes, codes))
        all_scales.append((weight.scales, scales))
        missing -= codes.numel()
    if missing:
        all_codes.append((weight.codes, torch.zeros(missing, dtype=all_codes[0][1].dtype)))
    return [*all_codes, *all_scales]


def _dtype_of(model: ir.Model, name: str) -> torch.dtype:
    return ir.tensor_adapters.to_torch_dtype(cast(ir.DataType, model.graph.initializers[name].dtype))
