"""Adapters that change tables of tokens, made by released PEFT: the cases that the tests of every stage go through."""

from __future__ import annotations

from typing import Any, NamedTuple

import peft
import pytest
import torch
from torch import nn

from tests.conftest import QUIET_PEFT

QUIET = [
    *QUIET_PEFT,
    pytest.mark.filterwarnings("ignore:.*ensure_weight_tying:UserWarning"),
    pytest.mark.filterwarnings("ignore:While injecting the PEFT adapters:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Adapter 'default'. .* have invalid shape"),
]
TIED = {"tie_word_embeddings": True}
UNTIED = {"tie_word_embeddings": False}
TOKENS = [130, 5, 77]


class Case(NamedTuple):
    """A setting of an adapter on a base.

    Attributes:
        family: Of the tiny model.
        base: Fields of its configuration.
        config: The adapter's.
        head: Whether PEFT changes the output head too.
        alike: Whether head and embedding stay equal.
    """

    family: str
    base: dict[str, Any]
    config: dict[str, Any]
    head: bool
    alike: bool


def _llama(tied: bool, head: bool, alike: bool, targets: list[str], **config: Any) -> Case:
    return Case("llama", TIED if tied else UNTIED, {"target_modules": targets, **config}, head, alike)


def _gpt2(head: bool, alike: bool, targets: list[str], **config: Any) -> Case:
    return Case("gpt2", {}, {"target_modules": targets, **config}, head, alike)


_EMBED, _HEAD = ["q_proj", "embed_tokens"], ["q_proj", "embed_tokens", "lm_head"]
_ALONE = {"rank_pattern": {"embed_tokens": 3}, "alpha_pattern": {"embed_tokens": 2}, "use_rslora": True}
_APART = {"embed_tokens": TOKENS, "lm_head": [1, 130]}
CASES = {
    "LoRA, untied": _llama(False, False, False, _EMBED, **_ALONE),
    "LoRA, tied": _llama(True, False, False, _EMBED),
    "LoRA on both, tied": _llama(True, True, False, _HEAD),
    "LoRA, kept tied": _llama(True, True, True, _EMBED, ensure_weight_tying=True),
    "LoRA of one rank, kept tied": _llama(True, True, False, _EMBED, ensure_weight_tying=True, **_ALONE),
    "LoRA of the head, kept tied": _llama(True, True, True, ["q_proj", "lm_head"], ensure_weight_tying=True),
    "LoRA on the embedding alone": _llama(True, False, False, ["embed_tokens"]),
    "DoRA, untied": _llama(False, False, False, _EMBED, use_dora=True),
    "DoRA on both, tied": _llama(True, True, False, _HEAD, use_dora=True),
    "tokens, untied": _llama(False, False, False, ["q_proj"], trainable_token_indices=TOKENS),
    "tokens, tied": _llama(True, True, True, ["q_proj"], trainable_token_indices=TOKENS),
    "tokens of both, tied": _llama(True, True, False, ["q_proj"], trainable_token_indices=_APART),
    "tokens of the head, tied": _llama(True, True, False, ["q_proj"], trainable_token_indices={"lm_head": [2, 9]}),
    "saved, kept tied": _llama(
        True, True, True, ["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True
    ),
    "saved both, tied": _llama(True, True, False, ["q_proj"], modules_to_save=["embed_tokens", "lm_head"]),
    "GPT-2, LoRA": _gpt2(False, False, ["c_attn", "wte"]),
    "GPT-2, positions": _gpt2(False, True, ["c_attn", "wpe"]),
    "GPT-2, tokens": _gpt2(True, True, ["c_attn"], trainable_token_indices={"wte": TOKENS}),
}


def peft_model(base: nn.Module, config: dict[str, Any]) -> Any:
    """A PEFT adapter on the base, every trained parameter moved at random; tied ones once, as they share memory."""
    model: Any = peft.get_peft_model(
        base, peft.LoraConfig(**({"r": 4, "lora_alpha": 10, "task_type": "CAUSAL_LM"} | config))
    )
    moved: set[int] = set()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and parameter.data_ptr() not in moved:
                moved.add(parameter.data_ptr())
                noise = torch.randn_like(parameter) * 0.2
                parameter.copy_(noise if ".lora_A" in name or ".lora_B" in name else parameter + noise)
    return model.eval()


def without_tables(model: nn.Module) -> None:
    """Take out what a PEFT adapter changes in tables of tokens, and leave the rest, in place."""
    with torch.no_grad():
        for name, module in model.named_modules():
            table = name.endswith(("embed_tokens", "lm_head", "wte", "wpe"))
            if table and hasattr(module, "token_adapter"):
                module.token_adapter.enable_adapters(False)
            elif table and hasattr(module, "enable_adapters"):
                module.enable_adapters(False)
