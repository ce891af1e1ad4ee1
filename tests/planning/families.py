"""Tiny models of several families, with odd shapes, as configurations."""

from __future__ import annotations

from typing import Any

from transformers import (
    FalconConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedConfig,
    Qwen3Config,
)

_TOKENS: dict[str, Any] = {"vocab_size": 131, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_COMMON = _TOKENS | {
    "hidden_size": 60,
    "intermediate_size": 77,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "max_position_embeddings": 128,
}

CONFIGS: dict[str, PreTrainedConfig] = {
    # 6 heads of 10, 2 of them for keys and values; heads wider than hidden / heads
    "llama": LlamaConfig(**_COMMON, num_key_value_heads=2, head_dim=14),
    "qwen3": Qwen3Config(**_COMMON, num_key_value_heads=3, head_dim=10),
    "gpt2": GPT2Config(**_TOKENS, n_embd=60, n_head=6, n_layer=3, n_inner=77, n_positions=128),
    "phi": PhiConfig(**(_COMMON | {"num_attention_heads": 5})),  # half of each head is rotated: 6 of 12
    "phi3": Phi3Config(**_COMMON, num_key_value_heads=2),
    "gpt_neox": GPTNeoXConfig(**_COMMON),
    "falcon": FalconConfig(**_TOKENS, hidden_size=60, num_hidden_layers=3, num_attention_heads=6, ffn_hidden_size=77),
    # projects its embeddings: linear layers outside of the blocks
    "opt": OPTConfig(
        **_TOKENS,
        hidden_size=60,
        ffn_dim=77,
        num_hidden_layers=3,
        num_attention_heads=6,
        word_embed_proj_dim=42,
        max_position_embeddings=128,
    ),
}

# What someone who knows the family would say.
ATTENTION = {
    "llama": {"q_proj", "k_proj", "v_proj", "o_proj"},
    "qwen3": {"q_proj", "k_proj", "v_proj", "o_proj"},
    "gpt2": {"c_attn", "attn.c_proj"},
    "phi": {"q_proj", "k_proj", "v_proj", "dense"},
    "phi3": {"qkv_proj", "o_proj"},
    "gpt_neox": {"query_key_value", "dense"},
    "falcon": {"query_key_value", "dense"},
    "opt": {"q_proj", "k_proj", "v_proj", "out_proj"},
}
MLP = {
    "llama": {"gate_proj", "up_proj", "down_proj"},
    "qwen3": {"gate_proj", "up_proj", "down_proj"},
    "gpt2": {"c_fc", "mlp.c_proj"},
    "phi": {"fc1", "fc2"},
    "phi3": {"gate_up_proj", "down_proj"},
    "gpt_neox": {"dense_h_to_4h", "dense_4h_to_h"},
    "falcon": {"dense_h_to_4h", "dense_4h_to_h"},
    "opt": {"fc1", "fc2"},
}
