"""Put adapters on the linear layers of a model."""

from __future__ import annotations

import copy
import difflib
import logging
import re
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_deploy.config import LoraConfig, name_matches
from lora_deploy.errors import ConfigError
from lora_deploy.layers.checks import (
    check_called,
    check_initialization,
    check_saved,
    initialization,
    targets_for_peft,
    unused_patterns,
)
from lora_deploy.layers.embedding import TableLayer, is_table
from lora_deploy.layers.lean import make_lean
from lora_deploy.layers.linear import LoraLinear
from lora_deploy.layers.tables import Tie, plan_tables, table_layers
from lora_deploy.quantization.model import is_linear, linear_modules

__all__ = [
    "ParameterCount",
    "adapted_layers",
    "count_parameters",
    "find_targets",
    "get_lora_config",
    "get_lora_model",
    "lora_layers",
    "merge_adapter",
    "saved_modules",
    "unmerge_adapter",
]

_logger = logging.getLogger(__name__)
_Model = TypeVar("_Model", bound=nn.Module)

# PEFT saves the head of a classifier whatever its name: both of these, of which a model has one.
_CLASSIFIER_HEADS = ("classifier", "score")


class ParameterCount(NamedTuple):
    """How many parameters are trained, of how many; a 4-bit weight counts as the numbers it stands for."""

    trainable: int
    total: int

    def __str__(self) -> str:
        return f"{self.trainable:,} of {self.total:,} parameters are trained ({self.trainable / self.total:.2%})"


def get_lora_model(model: _Model, config: LoraConfig, *, lean: bool = True) -> _Model:
    """Put a layer with an update in the place of each targeted module and freeze everything else, in place.

    Linear layers become a `LoraLinear`, embeddings a `LoraEmbedding`; tables whose tokens are named a `TokenLayer`.

    Args:
        model: A transformers model (any nn.Module with named linear layers), dense or quantized by bitsandbytes.
        config: Which modules, which rank, what else is trained.
        lean: Keep as little as possible for the backward: the input of an adapted layer, of a norm, and the two
            factors of a gated MLP. False leaves it to autograd, which second derivatives and torch.func need.

    Returns:
        The same model. `count_parameters(model)` tells what is trained; it is logged too.

    Raises:
        ConfigError: A target matches nothing or is no linear layer and no embedding, or the model has an adapter
            already.
    """
    present = next(iter(adapted_layers(model)), None)
    if present is not None:
        raise ConfigError("the model has an adapter already", tensor=present, remedy="load the base anew")
    targets = find_targets(model, config)
    # All of these raise before anything is changed.
    saved = saved_modules(model, config)
    check_initialization(config, targets)
    check_saved(saved, targets)
    tables = plan_tables(model, config, targets, saved)
    for unused in unused_patterns(config, targets):
        _logger.warning("%s is the pattern of no adapted module", unused)
    model.requires_grad_(False)
    followers = {tables.tie.head} if tables.tie and tables.head_follows else set()
    for name, module in targets.items():
        if name in tables.lora or name in followers:
            continue
        if config.fan_in_fan_out and not isinstance(module, Conv1D):
            _logger.warning("fan_in_fan_out is set but %s is no Conv1D; its weight is read as (out, in)", name)
        layer = LoraLinear.from_base(
            module,
            config.rank(name),
            scaling=config.scaling(name),
            lora_dropout=config.lora_dropout,
            init_lora_weights=initialization(config),
            merge_weights=config.merge_weights,
            use_dora=config.use_dora,
            lora_bias=config.lora_bias,
        )
        layer.fused = lean
        _replace(model, name, layer)
    has_conv1d = any(isinstance(module, Conv1D) for module in targets.values())
    config = config.model_copy(update={"fan_in_fan_out": has_conv1d} | targets_for_peft(config, targets))
    _train_saved_modules(model, saved, tables.shared)
    tables.put(model, config)
    tables.say_ties({*targets, *saved})
    _train_biases(model, config)
    if lean:
        make_lean(model)
    model._lora_config = config  # type: ignore[assignment]
    _logger.info("%s", count_parameters(model))
    return model


def get_lora_config(model: nn.Module) -> LoraConfig:
    """The configuration that `get_lora_model` was called with.

    Raises:
        ConfigError: The model has no adapter.
    """
    config = getattr(model, "_lora_config", None)
    if not isinstance(config, LoraConfig):
        raise ConfigError("the model has no adapter", expected="a model that get_lora_model() returned")
    return config


def lora_layers(model: nn.Module) -> dict[str, LoraLinear]:
    """The adapted layers by the name of the module they stand for, in the order of the model."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}


def adapted_layers(model: nn.Module) -> dict[str, LoraLinear | TableLayer]:
    """Everything that stands in the place of a module of the base, by that module's name."""
    return {**lora_layers(model), **table_layers(model)}


def merge_adapter(model: nn.Module) -> None:
    """`merge()` on every adapted linear layer. Embeddings look tokens up in base and update as before."""
    for layer in lora_layers(model).values():
        layer.merge()


def unmerge_adapter(model: nn.Module) -> None:
    """`unmerge()` on every adapted layer."""
    for layer in lora_layers(model).values():
        layer.unmerge()


def count_parameters(model: nn.Module) -> ParameterCount:
    """Count trainable and all parameters of a model."""
    trainable = total = 0
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        count = state.shape.numel() if state is not None else parameter.numel()
        total += count
        trainable += count if parameter.requires_grad else 0
    return ParameterCount(trainable, total)


def find_targets(model: nn.Module, config: LoraConfig) -> dict[str, nn.Module]:
    """The modules that the configuration targets, by full name.

    Raises:
        ConfigError: A name matches nothing, or something that is no linear layer and no embedding.
    """
    wanted = config.target_modules
    every = wanted is None or (isinstance(wanted, str) and wanted.lower() == "all-linear")
    targets = linear_modules(model) if every else _match_modules(model, config)
    excluded = config.exclude_modules
    targets = {name: module for name, module in targets.items() if excluded is None or not _matches(name, excluded)}
    targets = {name: module for name, module in targets.items() if not _is_saved(name, config)}
    if config.layers_to_transform not in (None, []):
        targets = {name: module for name, module in targets.items() if _in_layers(name, config)}
    if not targets:
        raise ConfigError(
            "no module is left to adapt",
            tensor="target_modules",
            found=f"{config.target_modules!r}, excluded {excluded!r}, layers {config.layers_to_transform!r}",
            expected=f"some of {_endings(linear_modules(model))}",
        )
    for name, module in targets.items():
        if not is_linear(module) and not is_table(module):
            raise ConfigError(
                "a target is no linear layer and no embedding",
                tensor=name,
                found=type(module).__name__,
                expected="a linear layer, or an embedding that looks its rows up and no more",
            )
        check_called(model, name)
    return targets


def _match_modules(model: nn.Module, config: LoraConfig) -> dict[str, nn.Module]:
    wanted = cast("list[str] | str", config.target_modules)
    modules = {name: module for name, module in model.named_modules() if name and not _is_saved(name, config)}
    targets = {name: module for name, module in modules.items() if _matches(name, wanted)}
    for pattern in [wanted] if isinstance(wanted, str) else wanted:
        if not any(_matches(name, pattern if isinstance(wanted, str) else [pattern]) for name in targets):
            endings = _endings({name: module for name, module in modules.items() if is_linear(module)})
            near = difflib.get_close_matches(pattern.rpartition(".")[2], endings, n=3, cutoff=0.4)
            raise ConfigError(
                "a target matches no module of the model",
                tensor=f"target_modules: {pattern}",
                expected=f"perhaps {', '.join(near)}" if near else f"one of {', '.join(endings)}",
            )
    return targets


def _matches(name: str, wanted: list[str] | str) -> bool:
    """PEFT's rule: a string is a regular expression for the whole name, a list holds names or their last parts."""
    if isinstance(wanted, str):
        return name_matches(wanted, name)
    return any(name == item or name.endswith(f".{item}") for item in wanted)


def _is_saved(name: str, config: LoraConfig) -> bool:
    """Whether the module is trained whole, or is a part of one that is; it then gets no adapter."""
    return any(re.match(rf"(.*\.)?{re.escape(saved)}(\.|$)", name) for saved in config.modules_to_save or [])


def _endings(modules: dict[str, nn.Module]) -> list[str]:
    return sorted({name.rpartition(".")[2] for name in modules})


def _in_layers(name: str, config: LoraConfig) -> bool:
    """PEFT's rule: the first number after a name of `layers_pattern`, or, without one, after any name but the first."""
    wanted = config.layers_to_transform
    indices = [wanted] if isinstance(wanted, int) else list(wanted or ())
    patterns = [config.layers_pattern] if isinstance(config.layers_pattern, str) else config.layers_pattern
    rules = [rf"(?:^|.*?\.){pattern}\.(?P<index>\d+)\." for pattern in patterns or () if pattern]
    for rule in rules or [r".*?\.[^.]*\.(?P<index>\d+)\."]:
        match = re.match(rule, name)
        if match is not None:
            return int(match["index"]) in indices
    return False


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


def saved_modules(model: nn.Module, config: LoraConfig) -> dict[str, nn.Module]:
    """The modules that are trained whole, by full name.

    Raises:
        ConfigError: A name of `modules_to_save` matches nothing.
    """
    found: dict[str, nn.Module] = {}
    for wanted in config.modules_to_save or []:
        # PEFT's rule, which "norm" makes "input_layernorm" too; a part of a module that is saved is saved with it.
        matches = {name: module for name, module in model.named_modules() if name.endswith(wanted)}
        matches = {name: module for name, module in matches.items() if any(True for _ in module.parameters())}
        if not matches and config.task_type in ("SEQ_CLS", "TOKEN_CLS") and wanted in _CLASSIFIER_HEADS:
            continue
        if not matches:
            near = difflib.get_close_matches(wanted, _endings(dict(model.named_modules())), n=3, cutoff=0.4)
            raise ConfigError(
                "a module to save is not in the model",
                tensor=f"modules_to_save: {wanted}",
                expected=f"perhaps {', '.join(near)}" if near else None,
            )
        found |= matches
    return {name: module for name, module in found.items() if not any(name.startswith(f"{other}.") for other in found)}


def _train_saved_modules(model: nn.Module, saved: dict[str, nn.Module], shared: Tie | None) -> None:
    """Train copies of modules; where both sides of a tie are to stay one, both are copied and share the weight."""
    if shared is not None and not saved.keys() & {*shared}:
        shared = None
    if shared is not None:
        saved = {**saved, **{name: model.get_submodule(name) for name in shared}}
    for name, module in saved.items():
        # A copy, so that a head tied to the embedding is trained alone and the embedding stays the base's.
        trained = copy.deepcopy(module)
        for parameter in trained.parameters():
            if not parameter.is_floating_point():
                raise ConfigError(
                    "a module to save is quantized and cannot be trained whole",
                    tensor=name,
                    remedy="leave it out of the quantization (skip_modules)",
                )
        outside = next(trained.parameters()).dtype
        if outside != torch.float32:
            _compute_in_float32(trained, outside)
        for parameter in trained.parameters():
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
        _replace(model, name, trained)
    if shared is not None:
        model.get_submodule(shared.head).weight = model.get_submodule(shared.embedding).weight


def _compute_in_float32(module: nn.Module, outside: torch.dtype) -> None:
    """Let a module whose parameters are float32 take and give the narrower type of the model around it."""

    def widen(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(x.float() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in inputs)

    def narrow(_: nn.Module, __: Any, output: Any) -> Any:
        return output.to(outside) if isinstance(output, torch.Tensor) else output

    module.register_forward_pre_hook(widen)
    module.register_forward_hook(narrow)


def _train_biases(model: nn.Module, config: LoraConfig) -> None:
    if config.bias == "all":
        for name, parameter in model.named_parameters():
            if name == "bias" or name.endswith(".bias"):
                parameter.requires_grad_(True)
    elif config.bias == "lora_only":  # an embedding has none
        for layer in lora_layers(model).values():
            if layer.bias is not None:
                layer.bias.requires_grad_(True)
