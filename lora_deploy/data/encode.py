"""One record as tokens, each marked as learned or only read."""

from __future__ import annotations

from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from lora_deploy.errors import CheckpointError, DataError

__all__ = ["encode"]


def encode(
    place: str, record: dict[str, Any], tokenizer: PreTrainedTokenizerBase, chat_template: bool
) -> tuple[list[int], list[bool]]:
    """Tokenize one record.

    Args:
        place: File and line, for messages.
        record: Of one of the three forms.
        tokenizer: The base's.
        chat_template: Whether prompt/completion go through the tokenizer's chat template, if it has one.

    Returns:
        Token ids, and for each whether it is learned.

    Raises:
        DataError: The record does not fit the chat template.
        CheckpointError: The tokenizer has no end token.
    """
    if "text" in record:
        ids = [*_tokenize(tokenizer, record["text"]), _end_token(tokenizer)]
        return ids, [True] * len(ids)
    if "messages" in record:
        if not tokenizer.chat_template:
            raise DataError(
                "the data has chat messages, but the base's tokenizer has no chat template",
                file=place,
                remedy="write prompt and completion, or text, or take an instruction-tuned base",
            )
        return _encode_chat(place, record["messages"], tokenizer)
    if chat_template and tokenizer.chat_template:
        messages = [
            {"role": "user", "content": record["prompt"]},
            {"role": "assistant", "content": record["completion"]},
        ]
        return _encode_chat(place, messages, tokenizer)
    return _encode_completion(record["prompt"], record["completion"], tokenizer)


def _encode_completion(
    prompt: str, completion: str, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[bool]]:
    before = _tokenize(tokenizer, prompt)
    whole = _tokenize(tokenizer, prompt + completion)
    # When the model is used, the prompt is tokenized alone. Where the joint text merges a token across the border,
    # the halves are tokenized apart, so that training sees the tokens that use will see.
    if whole[: len(before)] == before:
        after = whole[len(before) :]
    else:
        after = tokenizer.encode(completion, add_special_tokens=False)
    if completion:
        after = [*after, _end_token(tokenizer)]
    return before + after, [False] * len(before) + [True] * len(after)


def _tokenize(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokens with what the tokenizer puts before a text, but without an end token."""
    ids: list[int] = tokenizer.encode(text)
    while ids and ids[-1] == tokenizer.eos_token_id and not text.endswith(str(tokenizer.eos_token)):
        ids = ids[:-1]
    return ids


def _end_token(tokenizer: PreTrainedTokenizerBase) -> int:
    if tokenizer.eos_token_id is None:
        raise CheckpointError(
            "the base's tokenizer has no end token, so the model could not learn where to stop",
            file=tokenizer.name_or_path,
            expected="eos_token in tokenizer_config.json",
        )
    return int(tokenizer.eos_token_id)


def _encode_chat(
    place: str, messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[bool]]:
    """Find the assistant's turns by tokenizing the chat up to and including each of them."""
    whole = _chat_tokens(place, messages, tokenizer)
    learned = [False] * len(whole)
    special = set(tokenizer.all_special_ids)
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        upto = _chat_tokens(place, messages[: index + 1], tokenizer)
        starts = [_chat_tokens(place, messages[:index], tokenizer, ask=ask) for ask in (True, False)] if index else [[]]
        # A template may ask with more than it later shows of the answer (an empty thought, say): then without asking.
        start = next((start for start in starts if upto[: len(start)] == start), None)
        if start is None or whole[: len(upto)] != upto:
            raise DataError(
                "the chat template does not keep the beginning of a chat as it grows, so the assistant's tokens "
                "cannot be told from the others",
                file=place,
                tensor=f"messages[{index}]",
                expected="a template under which each turn only adds text",
                remedy="keep only the last turn of the assistant, or write prompt and completion with "
                "--no-chat-template",
            )
        end = len(upto)
        # What a template puts after the end token (a line break) is never generated, so it is not learned.
        last = next((at for at in range(end - 1, len(start), -1) if upto[at] in special), None)
        for at in range(len(start), end if last is None else last + 1):
            learned[at] = bool(message["content"])
    return whole, learned


def _chat_tokens(
    place: str, messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, ask: bool = False
) -> list[int]:
    try:
        ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, add_generation_prompt=ask)
    except (TemplateError, ValueError, TypeError, KeyError) as error:
        raise DataError(
            "the chat template refuses the messages",
            file=place,
            found=f"{error} (roles: {', '.join(message['role'] for message in messages)})",
        ) from error
    return list(ids)
