"""Take an adapter out of a model, and put one into it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from lora_deploy.adapter.adapter import LoraAdapter, LoraUpdate
from lora_deploy.adapter.files import read_adapter, write_adapter
from lora_deploy.errors import AdapterError
from lora_deploy.layers.model import get_lora_config, get_lora_model, lora_layers, saved_modules
from lora_deploy.quantization.model import is_linear, quantized_weight

__all__ = ["adapter_of", "apply_adapter", "load_adapter", "save_adapter"]


def adapter_of(model: nn.Module) -> LoraAdapter:
    """The adapter of a model, as copies on the CPU.

    Args:
        model: One that `get_lora_model` returned.

    Raises:
        ConfigError: The model has no adapter.
    """
    config = get_lora_config(model)
    updates = {
        name: LoraUpdate(
            _copy(layer.lora_A.weight),
            _copy(layer.lora_B.weight),
            layer.scaling,
            None if layer.lora_magnitude_vector is None else _copy(layer.lora_magnitude_vector),
            None if layer.lora_B.bias is None else _copy(layer.lora_B.bias),
        )
        for name, layer in lora_layers(model).items()
    }
    saved = set(saved_modules(model, config))
    parameters = {}
    for name, values in _plain_parameters(model).items():
        module, _, last = name.rpartition(".")
        in_saved = any(module == whole or module.startswith(f"{whole}.") for whole in saved)
        trained_bias = last == "bias" and (config.bias == "all" or (config.bias == "lora_only" and module in updates))
        if in_saved or trained_bias:
            parameters[name] = _copy(values)
    return LoraAdapter(config, updates, parameters)


def _copy(values: torch.Tensor) -> torch.Tensor:
    return values.detach().to("cpu", copy=True)


def _plain_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters by the names that they have in the model without adapters."""
    return {
        name.replace(".base_layer.", "."): parameter
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if ".lora_A." not in name and ".lora_B." not in name and not name.endswith(".lora_magnitude_vector")
    }


def apply_adapter(model: nn.Module, adapter: LoraAdapter) -> nn.Module:
    """Put an adapter into a model, in place. What it trains in the model becomes trainable, as it was.

    Args:
        model: The base, or a model with an adapter of the same configuration, whose values are replaced.
        adapter: What to put there.

    Returns:
        The same model.

    Raises:
        AdapterError: The adapter does not fit the model.
    """
    if lora_layers(model):
        _check_same_kind(model, adapter)
    else:
        # The output head too, which get_lora_model adapts where it is named.
        modules = {name: module for name, module in model.named_modules() if is_linear(module)}
        linears = {name: quantized_weight(module).shape for name, module in modules.items()}
        shapes = {name: tuple(values.shape) for name, values in _plain_parameters(model).items()}
        adapter.check_against(shapes, linears)
        # The layers are known, and every number will be replaced, however it began.
        known = {"target_modules": sorted(adapter.updates), "exclude_modules": None, "layers_to_transform": None}
        get_lora_model(model, adapter.config.model_copy(update=known | {"init_lora_weights": True}))
        model._lora_config = adapter.config  # type: ignore[assignment]
    layers = lora_layers(model)
    if set(layers) != set(adapter.updates):
        odd = sorted(set(layers) ^ set(adapter.updates))[0]
        raise AdapterError("the adapter and the model adapt different layers", file=adapter.source, tensor=odd)
    parameters = _plain_parameters(model)
    with torch.no_grad():
        for name, update in adapter.updates.items():
            for ending, values in update.tensors().items():
                layers[name].get_parameter(ending).copy_(values)
            layers[name].scaling = update.scaling
            if layers[name].merged:
                layers[name].unmerge()
                layers[name].merge()
        for name, values in adapter.parameters.items():
            parameters[name].copy_(values)
    return model


def _check_same_kind(model: nn.Module, adapter: LoraAdapter) -> None:
    """Make sure that an adapter can take the place of the one that the model has (copying would broadcast)."""
    config = get_lora_config(model)
    for field in ("bias", "modules_to_save", "use_dora", "lora_bias"):
        found, expected = getattr(adapter.config, field), getattr(config, field)
        if (found or None) != (expected or None):
            raise AdapterError(
                "the adapter trains other parameters than the one in the model",
                file=adapter.source,
                tensor=field,
                found=found,
                expected=expected,
                remedy="load the base anew",
            )
    for name, layer in lora_layers(model).items():
        update, shapes = adapter.updates.get(name), (layer.lora_A.weight.shape, layer.lora_B.weight.shape)
        if update is not None and (update.A.shape, update.B.shape) != shapes:
            raise AdapterError(
                "the adapter's update has another shape than the one in the model",
                file=adapter.source,
                tensor=name,
                found=f"A {tuple(update.A.shape)}, B {tuple(update.B.shape)}",
                expected=f"A {tuple(shapes[0])}, B {tuple(shapes[1])}",
                remedy="load the base anew",
            )


def save_adapter(model: nn.Module, directory: str | Path) -> None:
    """Write the adapter of a model in PEFT's format.

    Raises:
        ConfigError: The model has no adapter.
        OutputError: It could not be written.
    """
    write_adapter(adapter_of(model), directory)


def load_adapter(model: nn.Module, directory: str | Path) -> nn.Module:
    """Read an adapter in PEFT's format and put it into a model, in place.

    Raises:
        ConfigError: Its configuration is missing, damaged or asks for something that is not supported.
        AdapterError: Its weights are damaged or do not fit the model.
    """
    return apply_adapter(model, read_adapter(directory))
