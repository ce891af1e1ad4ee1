"""Low-rank adapters on linear layers, dense or quantized, and on tables of tokens."""

from lora_deploy.layers.embedding import LoraEmbedding, TokenLayer
from lora_deploy.layers.linear import LoraLinear
from lora_deploy.layers.model import (
    ParameterCount,
    count_parameters,
    get_lora_config,
    get_lora_model,
    lora_layers,
    merge_adapter,
    unmerge_adapter,
)

__all__ = [
    "LoraEmbedding",
    "LoraLinear",
    "ParameterCount",
    "TokenLayer",
    "count_parameters",
    "get_lora_config",
    "get_lora_model",
    "lora_layers",
    "merge_adapter",
    "unmerge_adapter",
]
