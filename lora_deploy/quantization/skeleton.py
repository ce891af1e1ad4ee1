"""A model without memory for its weights: names, shapes, layer types and ties."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.initialization import no_init_weights
from transformers.pytorch_utils import Conv1D

from lora_deploy.task import Task, auto_class

__all__ = ["LinearLayer", "describe_linear", "find_aliases", "make_skeleton", "renamed_keys"]


@dataclass(frozen=True)
class LinearLayer:
    """A linear layer of the model.

    Attributes:
        shape: (out, in).
        is_conv1d: Whether the checkpoint stores the weight as (in, out).
        has_bias: Whether there is a bias.
    """

    shape: tuple[int, int]
    is_conv1d: bool
    has_bias: bool


def make_skeleton(config: PreTrainedConfig, task: Task) -> PreTrainedModel:
    """The model of a configuration on the meta device, its weights tied as they will be."""
    with torch.device("meta"), no_init_weights():
        model: PreTrainedModel = auto_class(task).from_config(config, trust_remote_code=False)
    model.tie_weights()
    return model


def describe_linear(module: nn.Module) -> LinearLayer:
    """Shape and kind of a linear layer."""
    rows, columns = (int(size) for size in module.weight.shape)  # type: ignore[union-attr]
    is_conv1d = isinstance(module, Conv1D)
    return LinearLayer((columns, rows) if is_conv1d else (rows, columns), is_conv1d, module.bias is not None)


def find_aliases(model: nn.Module) -> dict[str, str]:
    """Names of parameters that are the same as another -> the name that comes first."""
    first: dict[int, str] = {}
    aliases = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in first:
            aliases[name] = first[id(parameter)]
        first.setdefault(id(parameter), name)
    return aliases


def renamed_keys(model: PreTrainedModel, keys: Iterable[str]) -> dict[str, str]:
    """Names of parameters that transformers gives another name than checkpoints do -> the checkpoint's.

    GPT-NeoX' output head is `embed_out` in every checkpoint and `lm_head` in the model.

    Args:
        model: The skeleton.
        keys: The checkpoint's.
    """
    renamings = [one for one in get_model_conversion_mapping(model) if type(one) is WeightRenaming]
    found = {}
    for key in keys:
        name = key
        for renaming in renamings:
            name = renaming.rename_source_key(name)[0]
        if name != key:
            found[name] = key
    return found
