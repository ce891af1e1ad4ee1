"""The codes of merged weights: calibrated ones wait on disk, all others are made when the data file gets them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import cast

import onnx_ir as ir
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lora_deploy.adapter import LoraAdapter, LoraUpdate
from lora_deploy.config import LoraConfig
from lora_deploy.errors import OutputError
from lora_deploy.export.graph import Segment, WeightSource
from lora_deploy.export.merge import MergedParameters
from lora_deploy.export.pipeline import Job, Parts, in_order
from lora_deploy.export.scales import cast_scales
from lora_deploy.export.weights import table_rows
from lora_deploy.manifest import CodedWeight, StoredModule
from lora_deploy.quantization.affine import AffineWeight
from lora_deploy.quantization.hashes import TensorHash
from lora_deploy.requantize.calibrate import calibrate, name_weight
from lora_deploy.requantize.options import Grid
from lora_deploy.requantize.rounding import pack_plain
from lora_deploy.requantize.text import Text

__all__ = ["RoundedWeights", "stream_rounded"]


class RoundedWeights:
    """Codes and scales of each layer that is rounded, and what corrects them.

    Args:
        directory: Where calibrated ones are kept until `remove`.
        parameters: The merged parameters.
        grids: Bits and block size of each layer.
        scale_dtype: Type that the scales will be stored in.

    Attributes:
        updates: The correction of each layer.
        hashes: Of each layer's codes and scales; there when the layer has been written.
        taken: How many rows of each text they were calibrated on (`rows_taken`).
    """

    def __init__(
        self, directory: Path, parameters: MergedParameters, grids: Mapping[str, Grid], scale_dtype: torch.dtype
    ) -> None:
        self.directory, self.parameters, self.grids, self.scale_dtype = directory, parameters, grids, scale_dtype
        self.updates: dict[str, LoraUpdate] = {}
        self.hashes: dict[str, str] = {}
        self.taken: dict[str, int] = {}
        self._on_disk: set[str] = set()

    def calibrate(self, texts: Sequence[Text], correction: int, on_layer: Callable[[int, int], None]) -> None:
        """Round the linear layers for some texts.

        Args:
            texts: To calibrate on; without any, nothing is done.
            correction: Rank of the branch that takes back part of the error; 0 for none.
            on_layer: Is told how many layers are done, and of how many.
        """
        linears = {name: grid for name, grid in self.grids.items() if name in self.parameters.base.linears}
        if not texts or not linears:
            return
        with _spooling(self.directory):
            self.directory.mkdir()

        def keep(name: str, weight: AffineWeight, update: LoraUpdate | None) -> None:
            tensors = {"codes": weight.packed().contiguous(), "scales": weight.scales.contiguous()}
            with _spooling(self._file(name)):
                save_file(tensors, self._file(name))
            self._on_disk.add(name)
            if update is not None:
                self.updates[name] = update
            on_layer(len(self._on_disk), len(linears))

        calibrate(self.parameters, linears, texts, keep, scale_dtype=self.scale_dtype, correction=correction)

    def correction(self) -> LoraAdapter:
        """The corrections as an adapter; a layer that no text reached has none of its own."""
        rank = max(len(update.A) for update in self.updates.values())
        return LoraAdapter(LoraConfig(r=rank, lora_alpha=rank), self.updates, source="the correction")

    def pieces(self, module: StoredModule) -> Sequence[range | None]:
        """The rows of a layer that are rounded at once; None for all."""
        if module.name in self._on_disk:
            return [None]
        whole = WeightSource((Segment(f"{module.name}.weight", range(module.shape[0])),))
        return table_rows(self.parameters, whole) or [None]

    def read(self, module: str, rows: range | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes and scales of one layer, or of some rows that `pieces` names, as the initializers hold them.

        Raises:
            InputError: A merged weight is not finite, or too large for the scales' type.
        """
        if module in self._on_disk:
            with _spooling(self._file(module)):
                tensors = load_file(self._file(module))
            return tensors["codes"], tensors["scales"]
        parameters, (bits, blocksize) = self.parameters, self.grids[module]
        layer = parameters.base.linears.get(module)
        with name_weight(parameters, module):
            values = parameters.read(f"{module}.weight", transposed=layer is not None and layer.is_conv1d, rows=rows)
            return pack_plain(values, bits, blocksize, self.scale_dtype)

    def _file(self, module: str) -> Path:
        return self.directory / f"{hashlib.sha256(module.encode()).hexdigest()[:32]}.safetensors"

    def remove(self) -> None:
        """Delete what is on disk."""
        if self._on_disk:
            for file in self.directory.iterdir():
                file.unlink()
            self.directory.rmdir()


@contextmanager
def _spooling(file: Path) -> Iterator[None]:
    """What the system refuses, as an error of ours."""
    try:
        yield
    except (OSError, SafetensorError) as error:  # the latter is what safetensors makes of a full disk
        raise OutputError("the export could not be written", file=file, found=str(error)) from error


def stream_rounded(
    model: ir.Model, coded: Sequence[CodedWeight], rounded: RoundedWeights
) -> Iterator[tuple[str, torch.Tensor]]:
    """Codes and scales of every product, several layers at a time.

    Args:
        model: The graph; tells the types.
        coded: The products.
        rounded: Where they are.

    Yields:
        Name of the initializer and values of it, one part after the other.

    Raises:
        InputError: A merged weight is not finite, or a scale is too large or too small for the type of the computation.
    """
    yield from in_order(_jobs(model, coded, rounded))


def _jobs(model: ir.Model, coded: Sequence[CodedWeight], rounded: RoundedWeights) -> Iterator[Job]:
    for weight in coded:
        if not weight.requantized:
            continue
        dtype = ir.tensor_adapters.to_torch_dtype(cast(ir.DataType, model.graph.initializers[weight.scales].dtype))
        scales: list[torch.Tensor] = []
        for module in weight.modules:
            layer, is_last = _Layer(weight, module, rounded, dtype), module is weight.modules[-1]
            pieces = rounded.pieces(module)
            for rows in pieces:
                values = (module.shape[0] if rows is None else len(rows)) * module.shape[1]
                ends = rows is pieces[-1]
                finish = partial(layer.finish, scales=scales, ends_layer=ends, ends_weight=ends and is_last)
                yield Job(values, partial(layer.make, rows), finish)


class _Layer:
    """One layer on its way into the initializers that it shares with its neighbours."""

    def __init__(self, weight: CodedWeight, module: StoredModule, rounded: RoundedWeights, dtype: torch.dtype) -> None:
        self._weight, self._module, self._rounded, self._dtype = weight, module, rounded, dtype
        self._scales: list[torch.Tensor] = []
        self._digest = TensorHash()

    def make(self, rows: range | None) -> Parts:
        codes, scales = self._rounded.read(self._module.name, rows)
        return [(self._weight.codes, codes), (self._weight.scales, scales)]

    def finish(
        self, parts: Parts, *, scales: list[torch.Tensor], ends_layer: bool, ends_weight: bool
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Codes are written at once; scales wait for the last of the codes.

        Args:
            parts: What was made.
            scales: Those of the whole initializer so far.
            ends_layer: Whether no more rows of the layer will come.
            ends_weight: Whether no more rows of the initializer will come.
        """
        (_, codes), (_, own) = parts
        name, (rows, _) = self._module.name, self._module.shape
        if not self._scales:
            self._digest.begin(name, codes.dtype, (rows, *codes.shape[1:]))
        self._digest.add(codes)
        self._scales.append(own)
        if ends_layer:
            whole = torch.cat(self._scales)
            self._digest.begin(name, whole.dtype, tuple(whole.shape))
            self._digest.add(whole)
            self._rounded.hashes[name] = self._digest.hexdigest()
            base = self._rounded.parameters.base
            scales.append(cast_scales(whole, self._dtype, f"{name}.weight", base, merged=True))
        yield self._weight.codes, codes
        if ends_weight:
            yield from ((self._weight.scales, part) for part in scales)
