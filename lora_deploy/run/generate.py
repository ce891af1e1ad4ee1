"""Text generation from an exported model: streamed, greedy or sampled."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jinja2 import TemplateError
from numpy.typing import NDArray

from lora_deploy.checkpoint import read_json
from lora_deploy.errors import CheckpointError, UsageError
from lora_deploy.run.session import OnnxSession

__all__ = ["OnnxModel"]


class OnnxModel:
    """An exported directory as a model that answers.

    Args:
        directory: What `lora-deploy export` wrote.
        provider: "cpu" or "cuda".

    Attributes:
        tokenizer: The tokenizer of the base.
        eos_token_ids: The tokens that end an answer.
        context_length: How many tokens the model takes, prompt and answer; None where its configuration does not say.
        tokens_per_second: Decoding speed of the last generation, without the prompt; None before the first.

    Raises:
        CheckpointError: The directory is no export or is damaged.
        UsageError: onnxruntime or the provider is not installed.
    """

    def __init__(self, directory: str | Path, provider: Literal["cpu", "cuda"] = "cpu") -> None:
        from transformers import AutoTokenizer

        self.directory = Path(directory)
        self.session = OnnxSession(self.directory, provider)
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(self.directory)
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(
                "the export has no tokenizer that can be read",
                file=self.directory,
                found=str(error).splitlines()[0],
                remedy="export again from a base that has its tokenizer files",
            ) from error
        self.eos_token_ids = self._find_eos_token_ids()
        self.context_length = self._find_context_length()
        self.tokens_per_second: float | None = None

    def _find_eos_token_ids(self) -> set[int]:
        for name in ("generation_config.json", "config.json"):
            file = self.directory / name
            if not file.is_file():
                continue
            found = read_json(file).get("eos_token_id")
            if found is not None:
                return set(found) if isinstance(found, list) else {found}
        return {self.tokenizer.eos_token_id} - {None}

    def _find_context_length(self) -> int | None:
        file = self.directory / "config.json"
        config = read_json(file) if file.is_file() else {}
        return config.get("max_position_embeddings") or config.get("n_positions")

    def encode(self, prompt: str, *, chat_template: bool = True, system: str | None = None) -> list[int]:
        """Turn a prompt into tokens.

        Args:
            prompt: What the user says.
            chat_template: Make it the user's turn in the model's chat template, if it has one.
            system: The system message before it; None for the template's own.

        Raises:
            UsageError: There is no chat template that takes the system message.
        """
        if system is not None and not (chat_template and self.tokenizer.chat_template):
            raise UsageError("a system message needs a chat template", remedy="leave --system out")
        if chat_template and self.tokenizer.chat_template:
            messages = [{"role": "system", "content": system}] if system is not None else []
            messages.append({"role": "user", "content": prompt})
            try:
                encoded = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
            except TemplateError as error:
                raise UsageError(
                    "the model's chat template refuses the messages",
                    found=str(error),
                    remedy="leave --system out, or add --no-chat-template",
                ) from error
            return list(encoded["input_ids"])
        return list(self.tokenizer(prompt)["input_ids"])

    def generate_tokens(
        self,
        input_ids: list[int],
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | None = None,
    ) -> Iterator[int]:
        """Generate token by token, up to and including the end token, or to the end of the model's context.

        Args:
            input_ids: Tokens of the prompt.
            max_new_tokens: Stop after so many.
            temperature: 0 takes the most probable token each time; above, tokens are drawn from the distribution.
            top_k: Draw from the k most probable tokens only; 0 for all.
            top_p: Draw from the most probable tokens that together reach this probability only.
            seed: Makes drawing repeatable.

        Raises:
            UsageError: A setting is out of range, or the prompt is empty or longer than the context.
        """
        sound = (
            temperature >= 0 and 0 < top_p <= 1 and top_k >= 0 and max_new_tokens >= 1 and (seed is None or seed >= 0)
        )
        if not input_ids or not sound:
            raise UsageError(
                "this cannot be generated from",
                found=f"{len(input_ids)} prompt tokens, temperature {temperature}, top_k {top_k}, top_p {top_p}, "
                f"max_new_tokens {max_new_tokens}, seed {seed}",
                expected="a prompt, temperature >= 0, top_k >= 0, 0 < top_p <= 1, max_new_tokens >= 1, seed >= 0",
            )
        if self.context_length is not None:
            if len(input_ids) > self.context_length:
                raise UsageError(
                    "the prompt is longer than the model's context",
                    found=f"{len(input_ids)} tokens",
                    expected=f"at most {self.context_length}",
                    remedy="shorten the prompt",
                )
            max_new_tokens = min(max_new_tokens, self.context_length - len(input_ids) + 1)
        self.tokens_per_second = None
        random = np.random.default_rng(seed)
        new = np.array([input_ids], np.int64)
        mask = np.ones_like(new)
        cache = None
        started = 0.0
        for count in range(max_new_tokens):
            logits, cache = self.session.forward(new, mask, cache)
            if count == 0:
                started = time.perf_counter()
            else:
                self.tokens_per_second = count / (time.perf_counter() - started)
            token = choose_token(logits[0, -1], random, temperature, top_k, top_p)
            yield token
            if token in self.eos_token_ids:
                return
            new = np.array([[token]], np.int64)
            mask = np.concatenate([mask, np.ones_like(new)], axis=1)

    def stream(
        self, prompt: str, *, chat_template: bool = True, system: str | None = None, **options: Any
    ) -> Iterator[str]:
        """Generate text in pieces, as soon as each is complete. Options as `generate_tokens`."""
        tokens: list[int] = []
        shown = ""
        for token in self.generate_tokens(self.encode(prompt, chat_template=chat_template, system=system), **options):
            tokens.append(token)
            text = self.tokenizer.decode(tokens, skip_special_tokens=True)
            # A character of several tokens decodes to the replacement character until the last one is there.
            if text != shown and not text.endswith("\ufffd"):
                yield text[len(shown) :]
                shown = text
        if tokens and (rest := self.tokenizer.decode(tokens, skip_special_tokens=True)) != shown:
            yield rest[len(shown) :]

    def generate(self, prompt: str, **options: Any) -> str:
        """Generate the whole answer. Options as `stream` and `generate_tokens`."""
        return "".join(self.stream(prompt, **options))


def choose_token(
    logits: NDArray[np.float32], random: np.random.Generator, temperature: float, top_k: int, top_p: float
) -> int:
    """The next token: the most probable one, or one drawn by temperature, top-k and nucleus (top-p) sampling.

    Args:
        logits: (vocabulary,).
        random: Where chance comes from.
        temperature: Divides the logits; 0 for the most probable token.
        top_k: Keep so many tokens; 0 for all.
        top_p: Keep the most probable tokens that together reach this (https://arxiv.org/abs/1904.09751).
    """
    if temperature == 0:
        return int(logits.argmax())
    order = np.argsort(-logits, kind="stable")
    if top_k:
        order = order[:top_k]
    scaled = logits[order].astype(np.float64) / temperature
    probabilities = np.exp(scaled - scaled.max())
    probabilities /= probabilities.sum()
    if top_p < 1:
        kept = int(np.searchsorted(np.cumsum(probabilities), top_p)) + 1
        order, probabilities = order[:kept], probabilities[:kept] / probabilities[:kept].sum()
    return int(random.choice(order, p=probabilities))
