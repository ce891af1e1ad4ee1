"""Linear layers, embedding and output head whose merged weights become codes again (MatMulNBits)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, cast

import onnx_ir as ir
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lora_deploy.adapter import LoraAdapter, LoraUpdate
from lora_deploy.config import LoraConfig
from lora_deploy.errors import OutputError
from lora_deploy.export.coded import CodedBase, initializer_shapes
from lora_deploy.export.graph import WeightSource
from lora_deploy.export.merge import MergedParameters
from lora_deploy.export.scales import cast_scales
from lora_deploy.export.sites import constant
from lora_deploy.manifest import CodedWeight, StoredModule
from lora_deploy.quantization.affine import AffineWeight
from lora_deploy.quantization.base import TrainingBase
from lora_deploy.quantization.hashes import hash_tensors
from lora_deploy.requantize.calibrate import calibrate, name_weight
from lora_deploy.requantize.options import Grid
from lora_deploy.requantize.rounding import round_plain
from lora_deploy.requantize.text import Text

__all__ = ["RequantizedBase", "RoundedWeights", "correction_shapes", "lower_embedding", "stream_rounded"]


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


@contextmanager
def _spooling(file: Path) -> Iterator[None]:
    """What the system refuses, as an error of ours."""
    try:
        yield
    except (OSError, SafetensorError) as error:  # the latter is what safetensors makes of a full disk
        raise OutputError("the export could not be written", file=file, found=str(error)) from error


class RoundedWeights:
    """Codes, scales and corrections, on disk from the time they are made until the graph's data file gets them.

    Args:
        directory: Where they are kept; removed by `remove`.

    Attributes:
        updates: The correction of each layer.
        hashes: Of each layer's codes and scales.
        taken: How many rows of each text they were calibrated on (`rows_taken`).
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        with _spooling(directory):
            directory.mkdir()
        self.updates: dict[str, LoraUpdate] = {}
        self.hashes: dict[str, str] = {}
        self.taken: dict[str, int] = {}

    def make(
        self,
        parameters: MergedParameters,
        grids: Mapping[str, Grid],
        texts: Sequence[Text],
        scale_dtype: torch.dtype,
        correction: int,
        on_layer: Callable[[int, int], None],
    ) -> None:
        """Round every weight.

        Args:
            parameters: The merged parameters.
            grids: Bits and block size of each layer.
            texts: To calibrate on; none to round every weight by itself.
            scale_dtype: Type that the scales will be stored in.
            correction: Rank of the branch that takes back part of the error; 0 for none.
            on_layer: Is told how many layers are done, and of how many.
        """

        def keep(name: str, weight: AffineWeight, update: LoraUpdate | None) -> None:
            tensors = {"codes": weight.packed().contiguous(), "scales": weight.scales.contiguous()}
            self.hashes[name] = hash_tensors(iter([(name, list(tensors.values()))]))
            with _spooling(self._file(name)):
                save_file(tensors, self._file(name))
            if update is not None:
                self.updates[name] = update
            on_layer(len(self.hashes), len(grids))

        linears = {name: grid for name, grid in grids.items() if name in parameters.base.linears}
        calibrate(parameters, linears, texts, keep, scale_dtype=scale_dtype, correction=correction)
        for name, (bits, blocksize) in grids.items():
            if name not in linears:  # embedding and head
                with name_weight(parameters, name):
                    rounded = round_plain(parameters.read(f"{name}.weight"), bits, blocksize, scale_dtype)
                keep(name, rounded, None)

    def correction(self) -> LoraAdapter:
        """The corrections as an adapter; a layer that no text reached has none of its own."""
        rank = max(len(update.A) for update in self.updates.values())
        return LoraAdapter(LoraConfig(r=rank, lora_alpha=rank), self.updates, source="the correction")

    def read(self, module: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes and scales of one layer, as the initializers hold them."""
        with _spooling(self._file(module)):
            tensors = load_file(self._file(module))
        return tensors["codes"], tensors["scales"]

    def _file(self, module: str) -> Path:
        return self.directory / f"{hashlib.sha256(module.encode()).hexdigest()[:32]}.safetensors"

    def remove(self) -> None:
        """Delete what is on disk."""
        for file in self.directory.iterdir():
            file.unlink()
        self.directory.rmdir()


def stream_rounded(
    model: ir.Model, coded: Sequence[CodedWeight], base: TrainingBase, rounded: RoundedWeights
) -> Iterator[tuple[str, torch.Tensor]]:
    """Codes and scales of every product, those of one at a time.

    Args:
        model: The graph; tells the types.
        coded: The products.
        base: The training base, for messages.
        rounded: Where they are.

    Yields:
        Name of the initializer and its values.

    Raises:
        InputError: A scale is too large or too small for the type of the computation.
    """
    for weight in coded:
        if not weight.requantized:
            continue
        dtype = ir.tensor_adapters.to_torch_dtype(cast(ir.DataType, model.graph.initializers[weight.scales].dtype))
        parts = []
        for module in weight.modules:
            codes, scales = rounded.read(module.name)
            parts.append((codes, cast_scales(scales, dtype, f"{module.name}.weight", base, merged=True)))
        codes_shape, scales_shape = initializer_shapes(weight)
        codes, scales = (torch.cat(side) if len(side) > 1 else side[0] for side in zip(*parts, strict=True))
        del parts
        yield weight.codes, codes.view(codes_shape)
        yield weight.scales, scales.view(scales_shape)
