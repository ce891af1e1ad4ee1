"""Whether a tokenizer does what transformers' does, in everything that running a model asks of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer

from lora_deploy.tokenizer import LightTokenizer, load_tokenizer
from tests.tokenizer.made import CHATS, TEXTS


def both(directory: Path) -> tuple[LightTokenizer, Any]:
    """The light tokenizer of a directory, and transformers'."""
    light = load_tokenizer(directory)
    assert isinstance(light, LightTokenizer)
    return light, AutoTokenizer.from_pretrained(directory.absolute())


def assert_same(directory: Path) -> None:
    """Ids, chats, text and all else are the same."""
    light, whole = both(directory)
    for name in ("eos_token_id", "pad_token_id", "model_max_length", "special_tokens_map"):
        assert getattr(light, name) == getattr(whole, name), name
    for text in TEXTS:
        for special in (True, False):
            ids = whole(text, add_special_tokens=special)["input_ids"]
            assert dict(light(text, add_special_tokens=special)) == dict(whole(text, add_special_tokens=special))
            assert light.encode(text, add_special_tokens=special) == ids
        assert light.convert_ids_to_tokens(ids) == whole.convert_ids_to_tokens(ids)
        assert_same_text(light, whole, ids)
        assert dict(light(text, "a second .")) == dict(whole(text, "a second ."))
    _assert_same_arrays(light, whole)
    _assert_same_chats(light, whole)
    every = list(range(len(whole)))
    assert light.backend_tokenizer.get_vocab_size() == len(whole)
    assert light.convert_ids_to_tokens(every) == whole.convert_ids_to_tokens(every)
    assert_same_text(light, whole, every)


def assert_same_text(light: LightTokenizer, whole: Any, ids: list[int]) -> None:
    """Tokens, and each beginning of them, decode to the same text."""
    for count in {0, 1, 2, 3, len(ids) // 2, len(ids) - 1, len(ids)} - {-1}:
        for skip in (True, False):
            found = light.decode(ids[:count], skip_special_tokens=skip)
            assert found == whole.decode(ids[:count], skip_special_tokens=skip)


def _assert_same_arrays(light: LightTokenizer, whole: Any) -> None:
    for pairs in (None, TEXTS[::-1]):
        for padding in (False, True)[: 1 + (whole.pad_token_id is not None)]:
            texts, seconds = (TEXTS, pairs) if padding else (TEXTS[3:4], pairs and pairs[3:4])
            found = light(texts, seconds, padding=padding, return_tensors="np")
            expected = whole(texts, seconds, padding=padding, return_tensors="np")
            assert found.keys() == expected.keys()
            for name, values in found.items():
                np.testing.assert_array_equal(values, expected[name])
                assert values.dtype == expected[name].dtype


def _assert_same_chats(light: LightTokenizer, whole: Any) -> None:
    assert light.chat_template == whole.get_chat_template()
    for chat in CHATS:
        for prompt in (True, False):
            options = {"add_generation_prompt": prompt}
            found = light.apply_chat_template(chat, tokenize=False, **options)
            assert found == whole.apply_chat_template(chat, tokenize=False, **options)
            assert dict(light.apply_chat_template(chat, **options)) == dict(whole.apply_chat_template(chat, **options))
