"""What can be asked of a benchmark."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, PositiveInt, ValidationError

from lora_deploy.errors import UsageError
from lora_deploy.run.session import Weights
from lora_deploy.validation import as_usage_error

__all__ = ["BenchOptions"]

_PROMPT, _TOKENS = 128, 64
_WARMING = 1  # a token before a burst that is not measured
_SPECIAL = 2  # positions that some classifiers' configurations count, and that no token has


class BenchOptions(BaseModel):
    """The options of a benchmark.

    Attributes:
        directory: What `lora-deploy export` wrote.
        prompt_tokens: Tokens of the prompt, or of a text to classify; None for 128, or fewer where the model's context
            is short.
        tokens: Tokens that each burst decodes; None for 64, or fewer.
        runs: Processes that measure, one after the other.
        adapters: Names of the adapters to run with, the first one for decoding; empty for the first eight that the
            export has.
        provider: "cpu" or "cuda".
        weights: How weights that are kept as codes run, as `OnnxSession` takes it.
        threads: Of onnxruntime for one operator; None for what `lora-deploy run` takes.

    Raises:
        UsageError: An option is out of range.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    directory: Path
    prompt_tokens: PositiveInt | None = None
    tokens: PositiveInt | None = None
    runs: PositiveInt = 5
    adapters: tuple[str, ...] = ()
    provider: Literal["cpu", "cuda"] = "cpu"
    weights: Weights = "stored"
    threads: PositiveInt | None = None

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise as_usage_error(error, "an option of the benchmark is out of range") from error
        if len(set(self.adapters)) < len(self.adapters):
            raise UsageError("an adapter is named twice", found=", ".join(self.adapters))

    def lengths(self, context_length: int | None, *, decodes: bool) -> tuple[int, int]:
        """Tokens of the prompt and of a burst, 0 of a model that decodes none.

        Args:
            context_length: Of the model, in tokens; None where it does not say.
            decodes: Whether tokens are decoded after the prompt.

        Raises:
            UsageError: What was asked for is longer than the context.
        """
        tokens = (self.tokens or _TOKENS) if decodes else 0
        prompt = self.prompt_tokens or _PROMPT
        if context_length is None:
            return prompt, tokens
        room = context_length - (_WARMING if decodes else _SPECIAL)
        if decodes and self.tokens is None:
            tokens = max(1, min(tokens, room // 2 if self.prompt_tokens is None else room - prompt))
        if self.prompt_tokens is None:
            prompt = max(1, min(prompt, room - tokens))
        if prompt + tokens > room:
            raise UsageError(
                "these are more tokens than the model has positions for",
                found=f"a prompt of {prompt}" + (f", and {tokens} to decode" if decodes else ""),
                expected=f"at most {room} together",
                remedy="take a smaller --prompt-tokens" + (" or --tokens" if decodes else ""),
            )
        return prompt, tokens
