"""What a configuration may ask of a model, and how its targets are written for PEFT."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from lora_deploy.config import LoraConfig, pattern_matches
from lora_deploy.errors import ConfigError

__all__ = [
    "check_called",
    "check_initialization",
    "check_saved",
    "initialization",
    "targets_for_peft",
    "unused_patterns",
]


def initialization(config: LoraConfig) -> bool | str:
    """`init_lora_weights` in small letters, as PEFT takes it."""
    chosen = config.init_lora_weights
    return chosen.lower() if isinstance(chosen, str) else chosen


def check_initialization(config: LoraConfig, targets: Mapping[str, nn.Module]) -> None:
    """Make sure that training can begin as the configuration says.

    Raises:
        ConfigError: The initialization needs data or a decomposition, or even ranks where there are odd ones.
    """
    chosen = initialization(config)
    if chosen in ("eva", "mica"):
        raise ConfigError(
            "this initialization is not trained here; adapters that PEFT trained from it are read",
            tensor="init_lora_weights",
            found=chosen,
            expected="true, false, gaussian or orthogonal",
        )
    odd = [name for name in targets if config.rank(name) % 2]
    if chosen == "orthogonal" and odd:
        raise ConfigError(
            "the orthogonal initialization needs even ranks, in PEFT too",
            tensor=f"init_lora_weights: {odd[0]}",
            found=f"rank {config.rank(odd[0])}",
            expected="an even rank",
        )


def check_saved(saved: Mapping[str, nn.Module], targets: Mapping[str, nn.Module]) -> None:
    """Make sure that no module is to get an adapter and to be trained whole.

    `modules_to_save` names ends of names ("proj" is "q_proj" too), `target_modules` last parts.

    Raises:
        ConfigError: One is.
    """
    for name in targets:
        if name in saved:
            raise ConfigError(
                "a module is to get an adapter and to be trained whole",
                tensor=f"modules_to_save: {name}",
                expected="a module in target_modules or in modules_to_save, not in both",
            )


def check_called(model: nn.Module, name: str) -> None:
    """Make sure that a linear layer is one that its parent calls: torch's attention only reads its `out_proj`.

    Raises:
        ConfigError: An adapter there would do nothing.
    """
    if isinstance(model.get_submodule(name.rpartition(".")[0]), nn.MultiheadAttention):
        raise ConfigError(
            "a target is a part of torch's MultiheadAttention, which reads its weight and never calls it",
            tensor=name,
            found="nn.MultiheadAttention",
            expected="a linear layer that is called",
            remedy="name it in exclude_modules",
        )


def unused_patterns(config: LoraConfig, targets: Mapping[str, nn.Module]) -> list[str]:
    """The keys of `rank_pattern` and `alpha_pattern` that are the pattern of no target, each as `field: key`."""
    patterns = [(field, pattern) for field in ("rank_pattern", "alpha_pattern") for pattern in getattr(config, field)]
    return [
        f"{field}: {pattern}"
        for field, pattern in patterns
        if not any(pattern_matches(pattern, name) for name in targets)
    ]


def targets_for_peft(config: LoraConfig, targets: Mapping[str, nn.Module]) -> dict[str, Any]:
    """The fields that say what was adapted, as PEFT reads them.

    PEFT takes no choice of layers beside a string, and None is another set of modules there.
    """
    if isinstance(config.target_modules, list):
        return {}
    fields: dict[str, Any] = {"layers_to_transform": None, "layers_pattern": None}
    if config.layers_to_transform not in (None, []):
        return fields | {"target_modules": sorted(targets)}
    return fields | ({"target_modules": "all-linear"} if config.target_modules is None else {})
