"""What OpenAI's API sends and is sent, as far as a local model can answer it."""

from __future__ import annotations

import time
import uuid
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from lora_deploy.errors import UsageError
from lora_deploy.run.sampling import Sampling

__all__ = ["ChatRequest", "CompletionRequest", "chunk_of", "new_place", "response_of"]

# Fields of OpenAI's that change no token.
_HARMLESS = {
    "metadata",
    "parallel_tool_calls",
    "prompt_cache_key",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
    "verbosity",
}
# Values by which a field asks for nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False, 0),
    "modalities": (["text"],),
    "n": (1,),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "tool_choice": ("none",),
    "tools": ([],),
    "top_logprobs": (0,),
}
_STOPS, _STOP_LETTERS = 16, 256


def _check_letters(text: str) -> str:
    """JSON can hold halves of letters, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("the text is no Unicode") from None
    return text


_Text = Annotated[str, AfterValidator(_check_letters)]


class _StreamOptions(BaseModel):
    model_config = ConfigDict(extra="ignore")
    include_usage: bool | None = None


class _Request(BaseModel):
    """What both kinds of request have. A field that would change the answer and is not known is refused."""

    model_config = ConfigDict(extra="allow")

    model: str
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None

    @model_validator(mode="after")
    def _refuse_unknown(self) -> _Request:
        for name, value in (self.model_extra or {}).items():
            if value is not None and name not in _HARMLESS and value not in _NEUTRAL.get(name, ()):
                raise ValueError(f"{name} is not supported")
        if len(self.stops) > _STOPS or any(len(text) > _STOP_LETTERS for text in self.stops):
            raise ValueError(f"stop: at most {_STOPS} texts of {_STOP_LETTERS} letters")
        return self

    @property
    def stops(self) -> list[str]:
        """Texts that end the answer."""
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return [text for text in stops if text]

    def sampling(self, limit: int) -> Sampling:
        """How tokens are chosen.

        Args:
            limit: How many at most, where the request does not say.
        """
        return Sampling(
            limit if self.max_tokens is None else self.max_tokens,
            1.0 if self.temperature is None else self.temperature,
            self.top_k or 0,
            1.0 if self.top_p is None else self.top_p,
            self.seed,
        )


class CompletionRequest(_Request):
    """POST /v1/completions. OpenAI's default of 16 tokens is kept."""

    prompt: _Text | list[int] | list[_Text]

    @property
    def text(self) -> str | list[int]:
        """The one prompt."""
        if isinstance(self.prompt, list) and self.prompt and isinstance(self.prompt[0], str):
            if len(self.prompt) != 1:
                raise UsageError("one prompt a request", found=f"{len(self.prompt)} prompts")
            return self.prompt[0]
        return self.prompt  # type: ignore[return-value]


class _Part(BaseModel):
    type: Literal["text"]
    text: _Text


class _Message(BaseModel):
    """A message; what it has beside role and text would be lost, and is refused."""

    model_config = ConfigDict(extra="allow")

    role: Literal["system", "developer", "user", "assistant"]
    content: _Text | list[_Part]
    name: str | None = None

    @model_validator(mode="after")
    def _refuse_unknown(self) -> _Message:
        for name, value in (self.model_extra or {}).items():
            if value:
                raise ValueError(f"{name} is not supported")
        return self

    def plain(self) -> dict[str, str]:
        """The message as chat templates take it."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


class ChatRequest(_Request):
    """POST /v1/chat/completions."""

    messages: list[_Message] = Field(min_length=1)
    max_completion_tokens: int | None = None

    def sampling(self, limit: int) -> Sampling:
        """As of every request; `max_completion_tokens` is what `max_tokens` is called now."""
        if self.max_completion_tokens is not None:
            self.max_tokens = self.max_completion_tokens
        return super().sampling(limit)


def response_of(request: _Request, text: str, reason: str | None, usage: dict[str, int]) -> dict[str, Any]:
    """A whole answer.

    Args:
        request: What was asked.
        text: The answer.
        reason: Why it ended.
        usage: Tokens, as OpenAI counts them.
    """
    chat = isinstance(request, ChatRequest)
    content: dict[str, Any] = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
    kind = "chat.completion" if chat else "text_completion"
    return {**_head(request, kind, new_place(request)), "choices": [_choice(content, reason)], "usage": usage}


def chunk_of(
    request: _Request, place: tuple[str, int], text: str | None, reason: str | None = None, first: bool = False
) -> dict[str, Any]:
    """A piece of a streamed answer; without text and reason, one that carries the usage alone.

    Args:
        request: What was asked.
        place: Id and time of the answer.
        text: The piece.
        reason: Why it ended, in the last.
        first: Whether it begins the answer.
    """
    chat = isinstance(request, ChatRequest)
    head = _head(request, "chat.completion.chunk" if chat else "text_completion", place)
    if text is None:
        return {**head, "choices": []}
    if not chat:
        return {**head, "choices": [_choice({"text": text}, reason)]}
    delta = ({"role": "assistant"} if first else {}) | ({"content": text} if text or first else {})
    return {**head, "choices": [_choice({"delta": delta}, reason)]}


def new_place(request: _Request) -> tuple[str, int]:
    """Id and time of a new answer."""
    return f"{'chatcmpl' if isinstance(request, ChatRequest) else 'cmpl'}-{uuid.uuid4().hex}", int(time.time())


def _head(request: _Request, kind: str, place: tuple[str, int]) -> dict[str, Any]:
    name, created = place
    return {"id": name, "object": kind, "created": created, "model": request.model}


def _choice(content: dict[str, Any], reason: str | None) -> dict[str, Any]:
    return {"index": 0, **content, "finish_reason": reason, "logprobs": None}
