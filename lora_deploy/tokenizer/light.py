"""A tokenizer of the `tokenizers` library with what running a model needs of transformers' interface."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from lora_deploy.tokenizer.chat import render_chat
from lora_deploy.tokenizer.settings import Settings

__all__ = ["LightTokenizer"]

# Spaces that a tokenizer of words puts before what follows a word directly.
_SPACED = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")


class LightTokenizer:
    """A tokenizer that gives what transformers' does, under the same names, and loads in a tenth of a second.

    Args:
        backend: The tokenizer itself.
        settings: What its files say beside.

    Attributes:
        backend_tokenizer: The tokenizer itself.
        name_or_path: The directory that it is from.
        chat_template: The chat template; None where there is none.
        special_tokens_map: The special tokens by name, such as "eos_token".
        model_max_length: How many tokens the model takes; 1e30 where nothing says.
    """

    def __init__(self, backend: Tokenizer, settings: Settings) -> None:
        self.backend_tokenizer = backend
        self.name_or_path = str(settings.directory)
        self.chat_template = settings.chat_template
        self.special_tokens_map = settings.special_tokens
        self.model_max_length = settings.model_max_length
        self._padding_side = settings.padding_side
        self._gives_token_types = settings.gives_token_types
        # transformers cleans up after tokenizers of words only, unless it is forced to.
        self._cleans_up = settings.cleans_up and (
            type(backend.model).__name__ != "BPE" or settings.cleans_up_pieces_of_words
        )

    @property
    def eos_token_id(self) -> int | None:
        """The token that ends a text; None where there is none."""
        return self._special_id("eos_token")

    @property
    def pad_token_id(self) -> int | None:
        """The token that shorter texts are filled up with; None where there is none."""
        return self._special_id("pad_token")

    def _special_id(self, name: str) -> int | None:
        token = self.special_tokens_map.get(name)
        return None if token is None else self.backend_tokenizer.token_to_id(token)

    def __call__(
        self,
        text: str | list[str],
        text_pair: str | list[str] | None = None,
        *,
        add_special_tokens: bool = True,
        padding: bool = False,
        return_tensors: str | None = None,
    ) -> dict[str, Any]:
        """Turn a text, or several, into tokens.

        Args:
            text: The text, or a list of them.
            text_pair: What comes second to the model, for each.
            add_special_tokens: Add those that the model wants around every text.
            padding: Fill shorter texts up to the longest.
            return_tensors: "np" for int64 arrays (texts, tokens); None for lists, of one text without the outer one.

        Returns:
            `input_ids` and `attention_mask`, and `token_type_ids` where the model is told the two texts apart.
        """
        many = not isinstance(text, str)
        rows: list[Any]
        if many:
            rows = list(text) if text_pair is None else list(zip(text, text_pair, strict=True))
        else:
            rows = [(text, text_pair)] if text_pair else [text]
        if padding:
            self.backend_tokenizer.enable_padding(
                direction=self._padding_side, pad_id=self.pad_token_id, pad_token=self.special_tokens_map["pad_token"]
            )
        else:
            self.backend_tokenizer.no_padding()
        found = self.backend_tokenizer.encode_batch(rows, add_special_tokens=add_special_tokens)
        encoded: dict[str, Any] = {
            "input_ids": [row.ids for row in found],
            "attention_mask": [row.attention_mask for row in found],
        }
        if self._gives_token_types:
            encoded["token_type_ids"] = [row.type_ids for row in found]
        if return_tensors == "np":
            return {name: np.array(values, np.int64) for name, values in encoded.items()}
        return encoded if many else {name: values[0] for name, values in encoded.items()}

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The tokens of a text."""
        ids: list[int] = self(text, add_special_tokens=add_special_tokens)["input_ids"]
        return ids

    def decode(self, token_ids: int | Iterable[int], skip_special_tokens: bool = False) -> str:
        """The text of tokens.

        Args:
            token_ids: A token, or several.
            skip_special_tokens: Leave special tokens out.
        """
        ids = [token_ids] if isinstance(token_ids, int) else [int(token) for token in token_ids]
        text: str = self.backend_tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)
        if self._cleans_up:
            for spaced in _SPACED:
                text = text.replace(spaced, spaced.strip())
        return text

    def convert_ids_to_tokens(self, ids: Iterable[int]) -> list[str | None]:
        """The tokens as the vocabulary writes them; None for what it does not have."""
        return [self.backend_tokenizer.id_to_token(int(token)) for token in ids]

    def apply_chat_template(
        self,
        conversation: Sequence[Mapping[str, str]],
        *,
        add_generation_prompt: bool = False,
        tokenize: bool = True,
        return_dict: bool = True,
    ) -> Any:
        """A conversation in the model's chat template.

        Args:
            conversation: Messages with `role` and `content`.
            add_generation_prompt: End with the beginning of the assistant's turn.
            tokenize: Give tokens; otherwise the text.
            return_dict: Give what a call gives; otherwise the tokens alone.

        Raises:
            ValueError: There is no chat template.
            jinja2.TemplateError: The template refuses the messages.
        """
        if self.chat_template is None:
            raise ValueError("the tokenizer has no chat template")
        text = render_chat(
            self.chat_template,
            conversation,
            self.special_tokens_map,
            add_generation_prompt=add_generation_prompt,
        )
        if not tokenize:
            return text
        encoded = self(text, add_special_tokens=False)
        return encoded if return_dict else encoded["input_ids"]
