"""Take an adapter out of a model, and put one into it."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import nn

from lora_deploy.adapter.adapter import LoraAdapter, LoraUpdate
from lora_deploy.adapter.files import read_adapter, write_adapter
from lora_deploy.adapter.tables import EmbeddingUpdate, TableUpdate, TokenRows, check_copy
from lora_deploy.config import LoraConfig
from lora_deploy.errors import AdapterError
from lora_deploy.layers.embedding import LoraEmbedding, TiedLoraHead, TokenLayer
from lora_deploy.layers.model import adapted_layers, get_lora_config, get_lora_model, lora_layers, saved_modules
from lora_deploy.layers.tables import find_tie, table_layers
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
    tables: dict[str, TableUpdate] = {}
    for name, table in table_layers(model).items():
        if isinstance(table, TiedLoraHead):
            a, b = _copy(table.lora_embedding_B.t()), _copy(table.lora_embedding_A.t())
            updates[name] = LoraUpdate(a.contiguous(), b.contiguous(), table.scaling)
        elif isinstance(table, LoraEmbedding):
            magnitude = None if table.lora_magnitude_vector is None else _copy(table.lora_magnitude_vector)
            a, b = _copy(table.lora_embedding_A), _copy(table.lora_embedding_B)
            tables[name] = EmbeddingUpdate(a, b, table.scaling, magnitude)
        elif isinstance(table, TokenLayer) and not table.follows:
            tables[name] = TokenRows(table.indices, _copy(table.trainable_tokens_delta))
    saved = set(saved_modules(model, config))
    tie = find_tie(model) if config.ensure_weight_tying else None
    saved |= {*tie} if tie is not None and saved & {*tie} else set()
    parameters = {}
    for name, values in _plain_parameters(model).items():
        module, _, last = name.rpartition(".")
        in_saved = any(module == whole or module.startswith(f"{whole}.") for whole in saved)
        trained_bias = last == "bias" and (config.bias == "all" or (config.bias == "lora_only" and module in updates))
        if in_saved or trained_bias:
            parameters[name] = _copy(values)
    return LoraAdapter(config, updates, parameters, tables=tables)


def _copy(values: torch.Tensor) -> torch.Tensor:
    return values.detach().to("cpu", copy=True)


_TRAINED = (".lora_magnitude_vector", ".lora_embedding_A", ".lora_embedding_B", ".trainable_tokens_delta")


def _plain_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters by the names that they have in the model without adapters."""
    return {
        name.replace(".base_layer.", "."): parameter
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if ".lora_A." not in name and ".lora_B." not in name and not name.endswith(_TRAINED)
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
    if adapted_layers(model):
        _check_same_kind(model, adapter)
    else:
        # The output head too, which get_lora_model adapts where it is named.
        modules = {name: module for name, module in model.named_modules() if is_linear(module)}
        linears = {name: quantized_weight(module).shape for name, module in modules.items()}
        shapes = {name: tuple(values.shape) for name, values in _plain_parameters(model).items()}
        adapter.check_against(shapes, linears)
        get_lora_model(model, _exact_config(model, adapter))
        model._lora_config = adapter.config  # type: ignore[assignment]
    layers, tables = lora_layers(model), table_layers(model)
    heads = {name: table for name, table in tables.items() if isinstance(table, TiedLoraHead)}
    own = {name for name, table in tables.items() if not table.follows}
    if ({*layers, *heads}, own) != ({*adapter.updates}, {*adapter.tables}):
        odd = sorted(({*layers, *heads} ^ {*adapter.updates}) | (own ^ {*adapter.tables}))[0]
        raise AdapterError("the adapter and the model adapt different layers", file=adapter.source, tensor=odd)
    parameters = _plain_parameters(model)
    with torch.no_grad():
        for name, change in adapter.tables.items():
            for ending, values in change.tensors().items():
                tables[name].get_parameter(ending.removeprefix("token_adapter.")).copy_(values)
        for name, update in adapter.updates.items():
            if name in heads:
                _check_tied(heads[name], update, name, adapter.source)
                heads[name].scaling = update.scaling
                continue
            for ending, values in update.tensors().items():
                layers[name].get_parameter(ending).copy_(values)
            layers[name].scaling = update.scaling
            if layers[name].merged:
                layers[name].unmerge()
                layers[name].merge()
        for name, values in adapter.parameters.items():
            if name.removesuffix(".weight") in adapter.tables:
                check_copy(parameters[name], values, name, adapter.source)
            else:
                parameters[name].copy_(values)
    return model


def _exact_config(model: nn.Module, adapter: LoraAdapter) -> LoraConfig:
    """A configuration that adapts the layers that the adapter has, and no others, however they began."""
    rows = {name: list(change.indices) for name, change in adapter.tables.items() if isinstance(change, TokenRows)}
    embeddings = adapter.tables.keys() - rows.keys()
    tie = find_tie(model)
    # PEFT ties embeddings of some names only, and says nothing of the others: what the file holds is what was tied.
    both_adapted = tie is not None and tie.embedding in embeddings and tie.head in adapter.updates
    ranks = dict(adapter.config.rank_pattern)
    if tie is not None and both_adapted:  # a head that is adapted as one with its embedding has the embedding's
        ranks[re.escape(tie.head)] = len(adapter.updates[tie.head].A)
    both_saved = tie is not None and all(f"{name}.weight" in adapter.parameters for name in tie)
    changes = {
        "target_modules": sorted(adapter.updates.keys() | embeddings),
        "exclude_modules": None,
        "layers_to_transform": None,
        "rank_pattern": ranks,
        "trainable_token_indices": rows or None,
        "ensure_weight_tying": adapter.config.ensure_weight_tying and (both_adapted or both_saved),
        "init_lora_weights": True,
    }
    return adapter.config.model_copy(update=changes)


def _check_tied(head: TiedLoraHead, update: LoraUpdate, name: str, source: str) -> None:
    """A head that follows its embedding cannot have an update of its own."""
    same = torch.equal(update.A.t().float(), head.lora_embedding_B.detach().cpu().float())
    if not same or not torch.equal(update.B.t().float(), head.lora_embedding_A.detach().cpu().float()):
        raise AdapterError(
            "embedding and output head are said to be adapted as one, but their updates differ",
            file=source,
            tensor=name,
            expected="A and B of the embedding, turned",
            remedy="set ensure_weight_tying to false in its configuration",
        )


def _check_same_kind(model: nn.Module, adapter: LoraAdapter) -> None:
    """Make sure that an adapter can take the place of the one that the model has (copying would broadcast)."""
    config = get_lora_config(model)
    for field in ("bias", "modules_to_save", "use_dora", "lora_bias", "trainable_token_indices"):
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
    for name, table in table_layers(model).items():
        change = adapter.tables.get(name)
        if change is not None and not table.follows and not change.fits(tuple(table.weight.shape)):
            raise AdapterError("the adapter changes another table", file=adapter.source, tensor=name)
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
