"""The deployed twin: the trained model in plain float32 PyTorch, but with the weights that an export really holds.

What is between it and onnxruntime is the error of the export; what is between it and the trained model is the error of
the deployment. Both are read from the file's own initializers: nothing is rounded anew.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import cast

import numpy as np
import onnx_ir as ir
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lora_deploy.adapter import LoraAdapter, LoraUpdate
from lora_deploy.adapter.int8 import dequantize
from lora_deploy.adapter.packing import deployed_adapter
from lora_deploy.errors import CheckpointError
from lora_deploy.export.coded import decode, initializer_shapes
from lora_deploy.export.merge import MergedParameters
from lora_deploy.export.ties import changed_tables
from lora_deploy.external import readable
from lora_deploy.layers.model import lora_layers
from lora_deploy.manifest import CodedWeight, Manifest, StoredModule
from lora_deploy.quantization.base import TrainingBase
from lora_deploy.run.interface import first_line
from lora_deploy.slots import Slot
from lora_deploy.verify.reference import apply_live, load_twin, put_parameters

__all__ = [
    "DeployedWeights",
    "check_stored",
    "flat_initializer",
    "load_deployed_twin",
    "split_modules",
    "take_update_out",
]


class DeployedWeights:
    """The weights of an export that are not those that were trained on, one layer at a time.

    Args:
        directory: The export.

    Attributes:
        model: Its graph.
        manifest: What that says of itself.
        modules: The layers, embedding and head among them.
        corrections: The branch beside each of them that takes back part of what rounding lost.
    """

    def __init__(self, directory: Path) -> None:
        file = directory / "model.onnx"
        self.model = ir.load(file)
        self.manifest = Manifest.read(self.model.metadata_props, file)
        self._coded = {
            module.name: weight for weight in self.manifest.coded if not weight.exact for module in weight.modules
        }
        self.modules = tuple(self._coded)
        check_stored(self.model, self.manifest, file)
        self.corrections: dict[str, LoraUpdate] = {}
        for slot in self.manifest.correction:
            try:
                self.corrections |= self._read_correction(slot)
            except (ArithmeticError, AssertionError, LookupError, NameError, RuntimeError, StopIteration) as error:
                raise CheckpointError(
                    "the correction in the export is not what the model says of it",
                    file=file,
                    tensor=slot.name,
                    found=first_line(error),
                    remedy="export again",
                ) from error

    @property
    def differs(self) -> bool:
        """Whether the export holds anything that is not what was trained, up to the rounding to its type."""
        int8 = any(slot.int8_blocks is not None for slot in self.manifest.slots)
        return bool(self.modules) or int8

    @property
    def is_merged(self) -> bool:
        """Whether the adapter's update is inside of these weights."""
        return self.manifest.branch is None and bool(self.modules)

    def read(self, module: str) -> torch.Tensor:
        """What a layer multiplies with, its correction included: float32 (out, in)."""
        weight = self._coded[module]
        for stored, codes, scales in split_modules(self.model, weight):
            if stored.name == module:
                values = decode(codes, scales, weight, stored.shape)
                break
        if module in self.corrections:
            values += self.corrections[module].delta_weight()
        return values

    def inside(self, module: str, base: TrainingBase) -> bool:
        """Whether a layer's weight is among these, its own or that of the layer it is still tied to."""
        shared = base.aliases.get(f"{module}.weight", "").removesuffix(".weight")
        return module in self._coded or shared in self._coded

    def _read_correction(self, slot: Slot) -> Iterator[tuple[str, LoraUpdate]]:
        """A and B of each of a slot's layers, from the strips that the file holds."""
        codes_a, scales_a, codes_b, scales_b = (flat_initializer(self.model, name) for name in slot.input_names)
        assert slot.int8_blocks is not None
        block_a, block_b = slot.int8_blocks
        blocks = slot.inputs // block_a
        rank = len(codes_a) // slot.inputs
        a = dequantize(codes_a.view(blocks, block_a, rank), scales_a.view(blocks, 1, rank)).flatten(0, 1)
        row = 0
        for module, its_rank in self._ranks(slot, rank).items():
            places = list(slot.places(module))
            start, width = places[0][0].start, places[-1][0].stop - places[0][0].start
            count = -(-width // block_b)
            strip, codes_b = codes_b[: its_rank * width], codes_b[its_rank * width :]
            factors, scales_b = scales_b[: its_rank * count], scales_b[its_rank * count :]
            values = dequantize(strip.view(its_rank, count, -1), factors.view(its_rank, count, 1)).flatten(1)
            b = torch.zeros(self._shape(module)[0], its_rank)
            for columns, rows in places:
                b[rows] = values[:, columns.start - start : columns.stop - start].t()
            yield module, LoraUpdate(a[:, row : row + its_rank].t().contiguous(), b, 1.0)
            row += its_rank

    def _shape(self, module: str) -> tuple[int, int]:
        return next(stored.shape for stored in self._coded[module].modules if stored.name == module)

    def _ranks(self, slot: Slot, total: int) -> dict[str, int]:
        """The rank of each layer of a slot: the one that was asked for, or what the layer's own sizes leave of it."""
        modules = [module for module in slot.modules if module in self._coded]
        for asked in range(1, total + 1):
            ranks = {module: min(asked, *self._shape(module)) for module in modules}
            if sum(ranks.values()) >= total:
                break
        return ranks


def check_stored(model: ir.Model, manifest: Manifest, file: Path) -> None:
    """Make sure that codes and scales are as many as the model says of itself.

    Args:
        model: The graph.
        manifest: What it says.
        file: The graph's, for messages.

    Raises:
        CheckpointError: A tensor is missing or has another size.
    """
    for weight in manifest.coded:
        for name, shape in zip((weight.codes, weight.scales), initializer_shapes(weight), strict=True):
            value = model.graph.initializers.get(name)
            found = value.const_value.size if value is not None and value.const_value is not None else None
            if found != math.prod(shape):
                raise CheckpointError(
                    "the codes in the graph are not those that the model says it has",
                    file=file,
                    tensor=name,
                    found="none" if found is None else f"{found:,} values",
                    expected=f"{math.prod(shape):,}",
                    remedy="export again",
                )


def flat_initializer(model: ir.Model, name: str) -> torch.Tensor:
    """The values of an initializer, flat, in their own type."""
    value = model.graph.initializers.get(name)
    tensor = value.const_value if value is not None else None
    if tensor is None:
        raise CheckpointError(
            "the graph lacks a tensor that it says it has", file="model.onnx", tensor=name, remedy="export again"
        )
    array = readable(tensor).numpy().reshape(-1)
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())


def split_modules(model: ir.Model, weight: CodedWeight) -> Iterator[tuple[StoredModule, torch.Tensor, torch.Tensor]]:
    """The layers of one product whose rows are whole blocks (8 bits, and what was made anew).

    Yields:
        The layer, its codes and its scales, flat.
    """
    codes, scales = flat_initializer(model, weight.codes), flat_initializer(model, weight.scales)
    for module in weight.modules:
        shapes = initializer_shapes(weight.model_copy(update={"modules": (module,)}))
        first, second = (math.prod(shape) for shape in shapes)
        yield module, codes[:first], scales[:second]
        codes, scales = codes[first:], scales[second:]


def load_deployed_twin(
    directory: str | Path | DeployedWeights, base: TrainingBase, adapter: LoraAdapter | None
) -> PreTrainedModel:
    """The twin with the weights that an export holds, and what of the adapter is not in them live beside it.

    Args:
        directory: The export, or its weights, if they have been opened.
        base: The training base.
        adapter: The adapter; None for the export without one.

    Returns:
        A float32 model on the CPU.
    """
    weights = directory if isinstance(directory, DeployedWeights) else DeployedWeights(Path(directory))
    twin = load_twin(base)
    for module in weights.modules:
        _put_weight(twin, base, weights, module)
    if adapter is None:
        return twin
    if not weights.is_merged:
        running = deployed_adapter(adapter, weights.manifest.slots)
        return apply_live(twin, _keep_factors(running, weights, base) if adapter.config.use_dora else running)
    for name, values in adapter.parameters.items():
        if not weights.inside(name.removesuffix(".weight"), base):
            _put_parameter(twin, name, values.float())
    for name, change in changed_tables(adapter, base.aliases).items():
        if not weights.inside(name.removesuffix(".weight"), base):
            _put_parameter(twin, name, change.change_table(twin.get_parameter(name).detach().clone()))
    for name, update in adapter.updates.items():
        if weights.inside(name, base):
            _move_bias(twin, name, update.scaled_bias())
    left = {name: update for name, update in adapter.updates.items() if not weights.inside(name, base)}
    if not left:
        return twin
    config = adapter.config.model_copy(
        update={"bias": "none", "modules_to_save": None, "trainable_token_indices": None}
    )
    return apply_live(twin, replace(adapter, config=config, updates=left, parameters={}, tables={}))


def _put_weight(twin: PreTrainedModel, base: TrainingBase, weights: DeployedWeights, module: str) -> None:
    """Also into the layers that share it, unless the export holds theirs apart."""
    values = weights.read(module)
    if isinstance(twin.get_submodule(module), Conv1D):
        values = values.t().contiguous()
    sharing = [alias for alias, name in base.aliases.items() if name == f"{module}.weight"]
    for name in (f"{module}.weight", *sharing):
        if name == f"{module}.weight" or name.removesuffix(".weight") not in weights.modules:
            _put_parameter(twin, name, values)


def _put_parameter(twin: PreTrainedModel, name: str, values: torch.Tensor) -> None:
    """Replace a parameter, and not those that shared its memory."""
    parent, _, last = name.rpartition(".")
    setattr(twin.get_submodule(parent), last, nn.Parameter(values, requires_grad=False))


def _keep_factors(adapter: LoraAdapter, weights: DeployedWeights, base: TrainingBase) -> LoraAdapter:
    """A DoRA whose factors on the deployed weights are those on the trained ones: the graph holds the factors."""
    own, updates = MergedParameters(base, None), dict(adapter.updates)
    for name, update in adapter.updates.items():
        if name in weights.modules:
            is_conv1d = name in base.linears and base.linears[name].is_conv1d
            trained = own.read(f"{name}.weight", transposed=is_conv1d)
            factors = update.row_scale(trained.to(torch.float32, copy=True))
            assert factors is not None
            norms = torch.linalg.vector_norm(weights.read(name) + update.delta_weight(), dim=1)
            updates[name] = replace(update, magnitude=factors * norms)
    return replace(adapter, updates=updates)


def _move_bias(twin: PreTrainedModel, module: str, values: torch.Tensor | None) -> None:
    """Add to the bias of a layer, which may have none yet."""
    if values is not None:
        layer = cast("nn.Linear | Conv1D", twin.get_submodule(module))
        moved = values if layer.bias is None else layer.bias.detach() + values
        layer.bias = nn.Parameter(moved, requires_grad=False)


def take_update_out(twin: PreTrainedModel, base: TrainingBase, adapter: LoraAdapter) -> None:
    """The control of weights that the update is inside of: the deployed twin less what the adapter brings, in place.

    The rounding stays, so that it is not the rounding that the gate sees. A classifier keeps the head it was trained
    with: the base may have none.

    Args:
        twin: From `load_deployed_twin`.
        base: The training base.
        adapter: Its adapter.
    """
    live, own = lora_layers(twin), MergedParameters(base, None)
    for name, update in adapter.updates.items():
        if name in live:
            live[name].active = False
            continue
        bias = update.scaled_bias()
        _move_bias(twin, name, None if bias is None else -bias)
        is_conv1d = isinstance(twin.get_submodule(name), Conv1D)
        delta = update.change(partial(own.read, f"{name}.weight", transposed=is_conv1d))
        if is_conv1d:
            delta = delta.t()
        _put_parameter(twin, f"{name}.weight", twin.get_parameter(f"{name}.weight") - delta)
    for name, change in changed_tables(adapter, base.aliases).items():
        table = own.read(name).float()
        _put_parameter(twin, name, twin.get_parameter(name) - (change.change_table(table.clone()) - table))
    if base.task == "causal-lm":
        for name in adapter.parameters:
            place = name.replace(".weight", ".base_layer.weight") if name.removesuffix(".weight") in live else name
            transposed = isinstance(twin.get_submodule(name.rpartition(".")[0]), Conv1D)
            values = own.read(name).float()
            put_parameters(twin, {place: values.t() if transposed and values.dim() == 2 else values})
