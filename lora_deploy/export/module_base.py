"""A torch module in memory as a training base: what `TrainingBase` is for a checkpoint."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from lora_deploy.errors import CheckpointError
from lora_deploy.layers.model import adapted_layers
from lora_deploy.quantization.base import TrainingBase
from lora_deploy.quantization.hashes import hash_tensors
from lora_deploy.quantization.model import is_linear, quantized_weight
from lora_deploy.quantization.scheme import QuantizationScheme
from lora_deploy.quantization.skeleton import describe_linear, find_aliases
from lora_deploy.quantization.weight import Blockwise4BitWeight, QuantizedWeight

__all__ = ["ModuleBase", "set_module"]


class ModuleBase(TrainingBase):
    """A module and the codes that its linear layers hold, without any adapter that is on it.

    Args:
        module: The module, on any device. It is left as it is: nothing of it is copied but its structure.
        inputs: An example of each input, by the name of `forward`'s argument, batch first where it has one.

    Attributes:
        module: The same without adapters; it shares its parameters with the user's.
        inputs: As given, on the CPU.

    Raises:
        CheckpointError: The module is PEFT's, or holds no tensors by the names that an adapter's file uses.
    """

    def __init__(self, module: nn.Module, inputs: Mapping[str, torch.Tensor]) -> None:
        self.directory = Path(type(module).__qualname__)  # for messages
        _refuse_peft(module, self.directory)
        self.module = _without_adapters(module)
        self.inputs = dict(inputs)
        self.config = PreTrainedConfig()
        self.task = "module"
        modules = {name: child for name, child in self.module.named_modules() if name and is_linear(child)}
        self._weights = {name: quantized_weight(child) for name, child in modules.items()}
        self.linears = {
            name: describe_linear(_plain_linear(modules[name], weight, "meta"))
            for name, weight in self._weights.items()
        }
        self.heads = ()
        self.embedding = None
        self.prequantized = any(weight.scheme != "none" for weight in self._weights.values())
        method = next((weight.scheme for weight in self._weights.values() if weight.scheme != "none"), "none")
        self.scheme = QuantizationScheme.model_validate({"method": method})
        skeleton = self.plain_module()
        self._state = {
            name: value for name, value in self.module.state_dict().items() if isinstance(value, torch.Tensor)
        }
        self.shapes = {name: tuple(value.shape) for name, value in skeleton.state_dict().items()}
        self.aliases = find_aliases(skeleton)
        self.dtype = None
        self._sha256: str | None = None

    def plain_module(self, dtype: torch.dtype | None = None) -> nn.Module:
        """The module with plain linear layers in the place of quantized ones, in evaluation mode, for tracing.

        Args:
            dtype: Type of the floats; None for what they are.

        Returns:
            Its parameters have memory that is never touched. Its buffers have their values, for a graph may hold them.
        """

        def cast_to(values: torch.Tensor) -> torch.Tensor:
            return values.to(dtype) if dtype is not None and values.is_floating_point() else values

        memo: dict[int, Any] = {id(buffer): cast_to(buffer.detach().cpu()) for buffer in self.module.buffers()}
        quantized = {id(child) for name, child in self.module.named_modules() if self._is_coded(name)}
        for child in self.module.modules():
            for parameter in child.parameters(recurse=False) if id(child) not in quantized else ():
                kind = dtype if dtype is not None and parameter.is_floating_point() else parameter.dtype
                empty = torch.empty(parameter.shape, dtype=kind)
                memo[id(parameter)] = nn.Parameter(empty, requires_grad=False)
        for name, child in self.module.named_modules():
            if id(child) in quantized:
                memo[id(child)] = _plain_linear(child, self._weights[name], "cpu", dtype)
        return copy.deepcopy(self.module, memo).train(False)

    def float_twin(self) -> nn.Module:
        """The module dequantized, in float32 on the CPU, with memory of its own: the reference of the parity check."""
        memo: dict[int, Any] = {}
        for name, child in self.module.named_modules():
            if self._is_coded(name):
                plain = _plain_linear(child, self._weights[name], "cpu", torch.float32)
                plain.weight.data.copy_(self._weights[name].dequantize())
                if plain.bias is not None:
                    plain.bias.data.copy_(cast(torch.Tensor, child.bias).detach())
                memo[id(child)] = plain
        twin = copy.deepcopy(self.module, memo).cpu()
        for values in (*twin.parameters(), *twin.buffers()):
            if values.is_floating_point():
                values.data = values.data.float()
        return twin.requires_grad_(False).train(False)

    def _is_coded(self, name: str) -> bool:
        return name in self._weights and self._weights[name].scheme != "none"

    def holds_codes(self, module: str) -> bool:
        """Whether a linear layer is quantized."""
        return self._is_coded(module)

    def codes_of(self, module: str) -> tuple[str, int]:
        """What a linear layer's codes are, and how many weights share one absmax; ("none", 0) for a dense layer."""
        if not self._is_coded(module):
            return "none", 0
        weight = self._weights[module]
        return weight.scheme, weight.blocksize if isinstance(weight, Blockwise4BitWeight) else weight.shape[1]

    def tensor(self, name: str, rows: range | None = None) -> torch.Tensor:
        """A parameter or buffer that is not quantized, or some of its rows, as it is."""
        values = self._state.get(self.aliases.get(name, name))
        if values is None or (name.endswith(".weight") and self._is_coded(name.removesuffix(".weight"))):
            raise CheckpointError("the module has no such plain tensor", file=self.directory, tensor=name)
        return (values if rows is None else values[rows.start : rows.stop]).detach().cpu()

    def place(self, name: str) -> dict[str, str]:
        """The module and the parameter, for messages."""
        return {"file": str(self.directory), "tensor": name}

    def weight(self, module: str) -> QuantizedWeight:
        """The weight of a linear layer as it was trained on."""
        return self._weights[module]

    def sha256(self) -> str:
        """Hash of the module's tensors, of codes as they are stored."""
        if self._sha256 is None:
            coded = {f"{name}.weight": weight for name, weight in self._weights.items() if weight.scheme != "none"}
            self._sha256 = hash_tensors(
                (name, list(coded[name].stored()) if name in coded else [self.tensor(name)])
                for name in sorted(self.shapes)
            )
        return self._sha256


def _refuse_peft(module: nn.Module, file: Path) -> None:
    for name, child in module.named_modules():
        if type(child).__module__.startswith("peft."):
            raise CheckpointError(
                "this module holds PEFT's own layers, which are not read in memory",
                file=file,
                tensor=name or "the module itself",
                found=type(child).__name__,
                remedy="save the adapter with save_pretrained() and give export_onnx the base module and the adapter's "
                "directory",
            )


def _without_adapters(module: nn.Module) -> nn.Module:
    """The same structure without adapters, with the same parameters and buffers."""
    memo: dict[int, Any] = {id(values): values for values in (*module.parameters(), *module.buffers())}
    clean = copy.deepcopy(module, memo).train(False)
    for name, layer in adapted_layers(clean).items():
        set_module(clean, name, layer.base_layer)
    return clean


def set_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in the place of another, by its full dotted name."""
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


def _plain_linear(module: nn.Module, weight: QuantizedWeight, device: str, dtype: torch.dtype | None = None) -> Any:
    """A linear layer as this one, with room for the weight; a Conv1D stays one."""
    outputs, inputs = weight.shape
    if isinstance(module, Conv1D):
        plain: Any = Conv1D(0, 0)  # type: ignore[no-untyped-call]
        plain.nf, plain.nx = outputs, inputs
        plain.weight = nn.Parameter(torch.empty(inputs, outputs, device=device, dtype=dtype), requires_grad=False)
        plain.bias = nn.Parameter(torch.empty(outputs, device=device, dtype=dtype), requires_grad=False)
        return plain
    plain = nn.Linear(inputs, outputs, bias=module.bias is not None, device=device, dtype=dtype)
    return plain.requires_grad_(False)
