"""The tokenizer of the `tokenizers` library that transformers would make of an export's files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken, Tokenizer, processors

from lora_deploy.tokenizer.recipes import Parts, Recipe, UnsureError
from lora_deploy.tokenizer.settings import Settings, Token

__all__ = ["build_backend"]


def build_backend(settings: Settings) -> Tokenizer:
    """Make it.

    Args:
        settings: What the files beside `tokenizer.json` say.

    Raises:
        UnsureError: It is not known here what transformers would make of the file.
        Exception: It is missing or damaged; the library's errors have no common base.
    """
    recipe = settings.recipe
    if recipe is None:
        tokenizer = Tokenizer.from_file(str(settings.file))
        pads, stored = tokenizer.padding is not None, tokenizer.get_added_tokens_decoder()
    else:
        content = json.loads(settings.file.read_text(encoding="utf-8"))
        parts = _parts(content["model"], recipe, settings)
        tokenizer = recipe.make(parts)
        if recipe.keeps_post_processor:
            tokenizer.post_processor = _post_processor(content)
        pads = content.get("padding") is not None
        stored = {token.pop("id"): AddedToken(**token) for token in content["added_tokens"]}
    if pads and not {"pad_token", "padding_side"} <= settings.options.keys():
        raise UnsureError("how texts are padded is in tokenizer.json alone")
    tokenizer.no_truncation()
    tokenizer.encode_special_tokens = bool(settings.options.get("split_special_tokens", False))
    if tokenizer.post_processor is None:
        tokenizer.post_processor = processors.TemplateProcessing(single="$A:0", pair="$A:0 $B:1", special_tokens=[])
    _add_tokens(tokenizer, stored if settings.added is None else settings.added, settings)
    if recipe is not None and recipe.adds_named_again:
        again = dict.fromkeys([*settings.special_tokens.values(), *map(str, settings.extra)])
        tokenizer.add_tokens([AddedToken(token, special=True) for token in again])
    if recipe is not None and recipe.finish is not None:
        recipe.finish(tokenizer, parts)
    return tokenizer


def _parts(model: Mapping[str, Any], recipe: Recipe, settings: Settings) -> Parts:
    kind, vocabulary = model.get("type"), model.get("vocab")
    if kind != recipe.model or not isinstance(vocabulary, dict):
        raise UnsureError(f"a vocabulary of kind {kind}")
    pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in model.get("merges", []))
    return Parts(vocabulary, [(first, second) for first, second in pairs], settings.options, settings.special_tokens)


def _post_processor(content: Mapping[str, Any]) -> Any:
    """What the file puts around a text; its vocabulary, which takes time, is not needed for that."""
    model = {**content["model"], "vocab": {}} | ({"merges": []} if "merges" in content["model"] else {})
    return Tokenizer.from_str(json.dumps({**content, "model": model, "added_tokens": []})).post_processor


def _add_tokens(tokenizer: Tokenizer, added: Mapping[int, AddedToken], settings: Settings) -> None:
    """Add tokens in the order that gives new ones the ids of transformers. Those that are there are changed."""
    tokens: list[Token] = [token for _, token in sorted(added.items())]
    there = {token.content for token in (*tokenizer.get_added_tokens_decoder().values(), *added.values())}
    in_full = {token.content: token for token in added.values()}
    named = [in_full.get(str(token), token) for token in settings.named.values()]
    for token in [*named, *settings.extra]:
        if str(token) not in there and token not in tokens:
            tokens.append(token)
    names = {str(token) for token in named}
    whole = [token if isinstance(token, AddedToken) else AddedToken(token, special=True) for token in tokens]
    for token in whole:
        token.special = token.special or token.content in names
    tokenizer.add_tokens(whole)
