"""Which class transformers' AutoTokenizer makes an export's tokenizer of: the only file that knows them by name.

transformers 5 makes some tokenizers anew by their class and takes no more than the vocabulary from `tokenizer.json`, so
that the class decides what the tokens are. What is not listed is left to transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_deploy.tokenizer.recipes import (
    Recipe,
    UnsureError,
    byte_level,
    composed_byte_level,
    finish_between_ends,
    finish_pair_of_ends,
    sentence_pieces,
    spaces_replaced,
    split_byte_level,
    words,
)

__all__ = ["RECIPES", "REGISTERED", "WRONG_ON_HUB", "choose_class"]

_AS_STORED = "TokenizersBackend"
_SENTENCE_PIECES = "LlamaTokenizer"
_END = "<|endoftext|>"
_ENDS = {"bos_token": _END, "eos_token": _END, "unk_token": _END}
_TAGS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
_MORE_TAGS = {"pad_token": "<pad>", "mask_token": "<mask>"}
_BRACKETS = {
    "unk_token": "[UNK]",
    "sep_token": "[SEP]",
    "pad_token": "[PAD]",
    "cls_token": "[CLS]",
    "mask_token": "[MASK]",
}

# How each class makes its tokenizer; None takes it as `tokenizer.json` has it.
RECIPES: dict[str, Recipe | None] = {
    _AS_STORED: None,
    "GPT2Tokenizer": Recipe(byte_level, _ENDS),
    "GPTNeoXTokenizer": Recipe(composed_byte_level, {**_ENDS, "pad_token": "<|padding|>"}, keeps_post_processor=False),
    "Qwen2Tokenizer": Recipe(
        split_byte_level, {"eos_token": _END, "unk_token": _END, "pad_token": _END}, adds_named_again=True
    ),
    _SENTENCE_PIECES: Recipe(sentence_pieces, _TAGS, padding_side="left"),
    "GemmaTokenizer": Recipe(
        spaces_replaced, {**_TAGS, **_MORE_TAGS, "bos_token": "<bos>", "eos_token": "<eos>"}, padding_side="left"
    ),
    "RobertaTokenizer": Recipe(
        byte_level, {**_TAGS, **_MORE_TAGS, "sep_token": "</s>", "cls_token": "<s>"}, finish=finish_between_ends
    ),
    "BertTokenizer": Recipe(words, _BRACKETS, "WordPiece", gives_token_types=True, finish=finish_pair_of_ends),
}

# The class that transformers has registered for a model; None where it has none.
REGISTERED: dict[str, str | None] = {
    "bert": "BertTokenizer",
    "distilbert": "BertTokenizer",
    "falcon": None,
    "gemma": "GemmaTokenizer",
    "gemma2": "GemmaTokenizer",
    "gemma3_text": "GemmaTokenizer",
    "gpt2": "GPT2Tokenizer",
    "gpt_neox": "GPTNeoXTokenizer",
    "granite": _AS_STORED,
    "llama": None,
    "mistral": _AS_STORED,
    "mixtral": _AS_STORED,
    "olmo2": _AS_STORED,
    "opt": "GPT2Tokenizer",
    "phi": "GPT2Tokenizer",
    "phi3": _AS_STORED,
    "qwen2": "Qwen2Tokenizer",
    "qwen3": "Qwen2Tokenizer",
    "roberta": "RobertaTokenizer",
    "smollm3": None,
    "stablelm": _AS_STORED,
    "starcoder2": "GPT2Tokenizer",
}
# Models of which transformers does not believe the class that their files name.
WRONG_ON_HUB = {"phi3", "qwen2"}
_ALIASES = {"PreTrainedTokenizer": _AS_STORED}


def choose_class(directory: Path, config: Mapping[str, Any], tokenizer_config: Mapping[str, Any]) -> str:
    """The class that AutoTokenizer takes.

    Args:
        directory: Holds `tokenizer.json`.
        config: What `config.json` holds.
        tokenizer_config: What `tokenizer_config.json` holds.

    Returns:
        A key of `RECIPES`.

    Raises:
        UnsureError: It is not known here.
    """
    model = config.get("model_type")
    if model not in REGISTERED or "model_name" in config or (directory / "tekken.json").exists():
        raise UnsureError(f"a model of type {model}")
    named = tokenizer_config.get("tokenizer_class") or config.get("tokenizer_class")
    named = None if named is None else str(named).removesuffix("Fast")
    named = _ALIASES.get(str(named), named)
    registered = REGISTERED[model]
    if named is not None and named not in RECIPES:
        raise UnsureError(f"a tokenizer of class {named}")
    if named == _SENTENCE_PIECES and model not in WRONG_ON_HUB and _is_byte_level(directory):
        return _AS_STORED
    if registered is None or named is None or registered == named:
        return named or registered or _AS_STORED
    if registered == _AS_STORED:
        return _AS_STORED
    return registered if model in WRONG_ON_HUB else named


def _is_byte_level(directory: Path) -> bool:
    return '"ByteLevel"' in (directory / "tokenizer.json").read_text(encoding="utf-8")
