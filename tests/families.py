"""The families of decoders, as tiny configurations, and what varies in each of them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import (
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Starcoder2Config,
)

CONTEXT, WINDOW = 24, 7
_TOKENS = {"vocab_size": 131, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
# Odd shapes: no width is a multiple of the block size of nf4, and heads are wider than hidden_size / heads.
_ROPE = _TOKENS | {
    "hidden_size": 44,
    "intermediate_size": 101,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 14,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.35,
}
_GPT = _TOKENS | {"initializer_range": 0.35}
_NEOX = _GPT | {
    "hidden_size": 64,
    "intermediate_size": 101,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
}
_SLIDING = {"sliding_window": WINDOW}
_GEMMA = _ROPE | _SLIDING | {"query_pre_attn_scalar": 23, "tie_word_embeddings": True}
_LAYERS = ["sliding_attention", "full_attention", "sliding_attention"]


@dataclass(frozen=True)
class Family:
    """A kind of model.

    Attributes:
        kind: Its configuration.
        fields: Of the configuration, what is tested first.
        variants: Other fields that change the function, by name.
    """

    kind: type[PreTrainedConfig]
    fields: Mapping[str, Any]
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def config(self, variant: str = "", **fields: Any) -> PreTrainedConfig:
        """The configuration of a variant; the first where it has no name."""
        asked = dict(self.fields) | dict(self.variants[variant] if variant else {}) | fields
        return self.kind(**copy.deepcopy(asked))  # transformers adds to what it is given


_LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_LLAMA3 |= {"original_max_position_embeddings": 8}
_ACTIVATIONS = ("gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "relu", "quick_gelu")
_YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 3.0, "original_max_position_embeddings": 8}
_LONGROPE = {"rope_type": "longrope", "rope_theta": 500.0, "short_factor": [1.0 + i / 9 for i in range(8)]}
_LONGROPE |= {"long_factor": [2.0 + i for i in range(8)]}

_LINEAR = {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 3.0}}
# What every model with rotary embeddings can be told.
_SETTINGS = _LINEAR | {"rms_norm_eps": 0.3, "hidden_act": "gelu", "tie_word_embeddings": True}
_GEMMA_ROPE = {kind: {"rope_type": "default", "rope_theta": 300.0} for kind in ("full_attention", "sliding_attention")}
_GEMMA_SETTINGS = {"rms_norm_eps": 0.3, "hidden_activation": "gelu", "tie_word_embeddings": False}

FAMILIES: dict[str, Family] = {
    "llama": Family(
        LlamaConfig,
        _ROPE,
        {
            "biases": {"attention_bias": True},
            "mlp_bias": {"mlp_bias": True},
            "tied": {"tie_word_embeddings": True},
            "llama3 rope": {"rope_parameters": _LLAMA3},
            "linear rope": _LINEAR,
            "dynamic rope": {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 500.0, "factor": 3.0}},
            "yarn": {"rope_parameters": _YARN},
            "longrope": {"head_dim": 16, "rope_parameters": _LONGROPE | {"original_max_position_embeddings": 12}},
            **{name: {"hidden_act": name} for name in _ACTIVATIONS},
            "epsilon": {"rms_norm_eps": 0.3},
        },
    ),
    "mistral": Family(MistralConfig, _ROPE | _SLIDING, {"settings": _SETTINGS, "no window": {"sliding_window": None}}),
    "qwen2": Family(
        Qwen2Config,
        _ROPE,
        {"settings": _SETTINGS, "window": _SLIDING | {"use_sliding_window": True, "max_window_layers": 1}},
    ),
    "qwen3": Family(
        Qwen3Config,
        _ROPE,
        {
            "settings": _SETTINGS,
            "window": _SLIDING | {"use_sliding_window": True, "max_window_layers": 1},
            "biases": {"attention_bias": True},
        },
    ),
    "gemma2": Family(
        Gemma2Config,
        _GEMMA | {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 20.0},
        {
            "settings": _GEMMA_SETTINGS | _LINEAR,
            "no caps": {"attn_logit_softcapping": None, "final_logit_softcapping": None},
            "other layers": {"layer_types": [*_LAYERS[1:], "sliding_attention"]},
        },
    ),
    "gemma3": Family(
        Gemma3TextConfig,
        _GEMMA | {"layer_types": _LAYERS},
        {
            "settings": _GEMMA_SETTINGS | {"rope_parameters": _GEMMA_ROPE},
            "linear rope": {"rope_parameters": _GEMMA_ROPE | {"full_attention": _LINEAR["rope_parameters"]}},
            "caps": {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 20.0},
        },
    ),
    "phi3": Family(
        Phi3Config,
        {name: value for name, value in (_ROPE | {"hidden_size": 64} | _SLIDING).items() if name != "head_dim"},
        {
            "settings": {"rms_norm_eps": 0.3, "hidden_act": "gelu", "tie_word_embeddings": True},
            "no window": {"sliding_window": None},
            "longrope": {"rope_parameters": _LONGROPE, "original_max_position_embeddings": 12},
            "partial rotary": {"partial_rotary_factor": 0.5},
            "partial longrope": {
                "rope_parameters": _LONGROPE
                | {"short_factor": [1.0, 1.3, 1.7, 2.0], "long_factor": [2.0, 3.0, 4.0, 6.0]},
                "partial_rotary_factor": 0.5,
                "original_max_position_embeddings": 12,
            },
        },
    ),
    "gpt2": Family(
        GPT2Config,
        _GPT | {"n_embd": 36, "n_inner": 101, "n_head": 4, "n_layer": 3, "n_positions": CONTEXT},
        {
            "scaled by layer": {"scale_attn_by_inverse_layer_idx": True},
            "unscaled": {"scale_attn_weights": False},
            "relu": {"activation_function": "relu"},
            "epsilon": {"layer_norm_epsilon": 0.3},
            "untied": {"tie_word_embeddings": False},
        },
    ),
    "gpt_neox": Family(
        GPTNeoXConfig,
        _NEOX,
        {
            "settings": {"layer_norm_eps": 0.3, "hidden_act": "relu"} | _LINEAR,
            "sequential": {"use_parallel_residual": False},
            "half rotary": {"rotary_pct": 0.5},
            "no attention bias": {"attention_bias": False},
            "gelu_fast": {"hidden_act": "gelu_fast"},
            "tied": {"tie_word_embeddings": True},
        },
    ),
    "opt": Family(
        OPTConfig,
        {name: value for name, value in _GPT.items() if name != "initializer_range"}
        | {"init_std": 0.35, "hidden_size": 36, "ffn_dim": 101, "num_hidden_layers": 3, "num_attention_heads": 4}
        | {"max_position_embeddings": CONTEXT, "word_embed_proj_dim": 36},
        {
            "projected": {"word_embed_proj_dim": 20},
            "norm after": {"do_layer_norm_before": False},
            "no biases": {"enable_bias": False},
            "plain norms": {"layer_norm_elementwise_affine": False},
            "gelu": {"activation_function": "gelu"},
        },
    ),
    "falcon": Family(
        FalconConfig,
        _GPT
        | {"hidden_size": 48, "ffn_hidden_size": 101, "num_hidden_layers": 3, "num_attention_heads": 4}
        | {"max_position_embeddings": CONTEXT, "multi_query": True, "parallel_attn": True, "bias": False},
        {
            "alibi": {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True},
            "alibi parallel": {"alibi": True, "multi_query": True, "parallel_attn": True},
            "new decoder": {"new_decoder_architecture": True, "num_kv_heads": 2},
            "new decoder, one norm": {
                "new_decoder_architecture": True,
                "num_kv_heads": 2,
                "num_ln_in_parallel_attn": 1,
            },
            "sequential": {"parallel_attn": False, "bias": True},
            "many heads": {"multi_query": False},
            "relu": {"activation": "relu"},
        },
    ),
    "starcoder2": Family(
        Starcoder2Config,
        {
            name: value
            for name, value in (_ROPE | {"hidden_size": 64} | _SLIDING | {"num_key_value_heads": 1}).items()
            if name != "head_dim"
        },
        {
            "settings": {"norm_epsilon": 0.3, "hidden_act": "relu"} | _LINEAR,
            "no window": {"sliding_window": None},
            "no biases": {"use_bias": False},
            "untied": {"tie_word_embeddings": False},
        },
    ),
}
