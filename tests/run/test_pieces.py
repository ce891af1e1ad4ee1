"""An answer as text while it comes: the pieces are the whole, and a continuation keeps its space."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import decoders
from transformers import LlamaTokenizer

from lora_deploy.run.pieces import Pieces
from tests.run.conftest import byte_tokenizer
from tests.tokenizer import made

TEXTS = ["the cat is a", "  two  spaces ", "日本 é 🦊 end", ""]


def _sentence_pieces() -> Any:
    """As Llama 2 decodes: without the space that is put before every text."""
    backend = made.sentence_pieces()
    backend.decoder = decoders.Sequence([backend.decoder, decoders.Strip(" ", 1, 0)])
    return LlamaTokenizer(tokenizer_object=backend)


@pytest.mark.parametrize("make", [byte_tokenizer, _sentence_pieces])
@pytest.mark.parametrize("text", TEXTS)
def test_pieces_are_the_whole(make: Any, text: str) -> None:
    tokenizer = make()
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = Pieces(tokenizer)
    assert "".join([*map(pieces.add, tokens), pieces.rest()]) == tokenizer.decode(tokens, skip_special_tokens=True)


@pytest.mark.parametrize("make", [byte_tokenizer, _sentence_pieces])
def test_a_continuation_goes_on_where_the_prompt_ends(make: Any) -> None:
    tokenizer = make()
    tokens = tokenizer("the cat is a fox", add_special_tokens=False)["input_ids"]
    texts = [tokenizer.decode(tokens[:end], skip_special_tokens=True) for end in range(len(tokens) + 1)]
    for end in range(1, len(tokens)):
        pieces = Pieces(tokenizer, tokens[end - 1 : end])
        assert texts[end] + "".join([*map(pieces.add, tokens[end:]), pieces.rest()]) == texts[-1]


def test_a_prompt_may_end_inside_a_character() -> None:
    tokenizer = byte_tokenizer()
    tokens = tokenizer("né", add_special_tokens=False)["input_ids"]
    assert len(tokens) == 3
    assert Pieces(tokenizer, tokens[1:2]).add(tokens[2]) == "é"


def test_without_the_prompt_a_space_would_be_lost() -> None:
    tokenizer = _sentence_pieces()
    prompt, whole = ([*tokenizer(text, add_special_tokens=False)["input_ids"]] for text in ("the", "the fox"))
    assert whole[: len(prompt)] == prompt
    said = []
    for after in ([], prompt[-1:]):
        pieces = Pieces(tokenizer, after)
        said.append("".join([*map(pieces.add, whole[len(prompt) :]), pieces.rest()]))
    assert said == ["fox", " fox"]
