"""The OpenAI API over an export: chat and completions, streamed or whole; `model` names the adapter."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse

from lora_deploy.run.generate import OnnxModel
from lora_deploy.run.pieces import Pieces
from lora_deploy.serve.engine import Engine, Event, Job
from lora_deploy.serve.front import adapter_names, check_name, create_front, describe, message_of
from lora_deploy.serve.protocol import ChatRequest, CompletionRequest, chunk_of, new_place, response_of

__all__ = ["create_app"]

_COMPLETION_TOKENS = 16  # OpenAI's default of /v1/completions
_CHAT_TOKENS = 1 << 30  # to the end of the context


def create_app(
    model: OnnxModel, *, name: str | None = None, api_key: str | None = None, max_batch: int = 8, max_waiting: int = 256
) -> FastAPI:
    """The application for an open export.

    Args:
        model: The export.
        name: What the base, or a model that is one for good, is called; None for the name of its directory.
        api_key: What clients must send; None to ask for nothing.
        max_batch: Rows that are decoded together at most.
        max_waiting: Requests that wait at most; more get the status 429.

    Returns:
        An ASGI application. Its `state.engine` runs from its start to its shutdown.

    Raises:
        UsageError: The base is called as one of its adapters.
    """
    manifest = model.session.manifest

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.engine = Engine(model, max_batch=max_batch, max_waiting=max_waiting)
        yield
        await asyncio.to_thread(app.state.engine.close)

    app = create_front(model.directory, manifest, name=name, api_key=api_key, lifespan=lifespan)

    @app.post("/v1/chat/completions", response_model=None)
    async def chat(asked: ChatRequest, request: Request) -> JSONResponse | StreamingResponse:
        prompt = await asyncio.to_thread(model.encode_chat, [message.plain() for message in asked.messages])
        return await answer(asked, request, prompt, _CHAT_TOKENS)

    @app.post("/v1/completions", response_model=None)
    async def completions(asked: CompletionRequest, request: Request) -> JSONResponse | StreamingResponse:
        prompt = asked.text
        if isinstance(prompt, str):
            prompt = await asyncio.to_thread(model.encode, prompt, chat_template=False)
        return await answer(asked, request, prompt, _COMPLETION_TOKENS)

    async def answer(
        asked: ChatRequest | CompletionRequest, request: Request, prompt: list[int], limit: int
    ) -> JSONResponse | StreamingResponse:
        check_name(asked.model, app.state.names())
        adapter = asked.model if asked.model in adapter_names(model.directory, manifest) else None
        after = prompt[-1:] if isinstance(asked, CompletionRequest) else []
        generation = _Generation(Pieces(model.tokenizer, after), asked.stops, len(prompt))
        sampling = asked.sampling(limit)
        job = app.state.engine.submit(
            prompt, adapter, sampling, generation.tell, bounded=sampling.max_new_tokens != _CHAT_TOKENS
        )
        waiting = asyncio.create_task(_cancel_if_gone(request, job))
        pieces = generation.pieces(job)
        try:
            if not asked.stream:
                text = "".join([piece async for piece in pieces])
                return JSONResponse(response_of(asked, text, generation.reason, generation.usage()))
            # What goes wrong before the first token is still an answer with a status.
            first = await anext(pieces, None)
        finally:
            waiting.cancel()
        return StreamingResponse(_stream(asked, generation, first, pieces), media_type="text/event-stream")

    return app


class _Generation:
    """An answer on its way from the engine's thread to the event loop."""

    def __init__(self, pieces: Pieces, stops: list[str], prompt_tokens: int) -> None:
        self.reason: str | None = None
        self.tokens = 0
        self._prompt_tokens = prompt_tokens
        self._pieces = pieces
        self._stops = stops
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()

    def tell(self, event: Event) -> None:
        """Take an event, in any thread."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    def usage(self) -> dict[str, int]:
        """Tokens, as OpenAI counts them."""
        total = self._prompt_tokens + self.tokens
        return {"prompt_tokens": self._prompt_tokens, "completion_tokens": self.tokens, "total_tokens": total}

    async def pieces(self, job: Job) -> AsyncIterator[str]:
        """The text, piece by piece, up to where a stop text begins; what may be the beginning of one is held back."""
        held = ""
        try:
            while True:
                event = await self._events.get()
                if isinstance(event, Exception):
                    raise event
                last = isinstance(event, str)
                if isinstance(event, int):
                    self.tokens += 1
                    held += self._pieces.add(event)
                else:
                    self.reason = event
                    held += self._pieces.rest()
                ends = [place for place in (held.find(stop) for stop in self._stops) if place >= 0]
                if ends:
                    self.reason, last, held = "stop", True, held[: min(ends)]
                ready = len(held) if last else len(held) - _possible_stop(held, self._stops)
                if ready:
                    yield held[:ready]
                    held = held[ready:]
                if last:
                    return
        finally:
            job.cancelled.set()


def _possible_stop(text: str, stops: list[str]) -> int:
    """How many letters at the end of a text may be the beginning of a stop text."""
    longest = max(map(len, stops), default=0)
    for length in range(min(longest - 1, len(text)), 0, -1):
        if any(stop.startswith(text[-length:]) for stop in stops):
            return length
    return 0


async def _stream(
    asked: ChatRequest | CompletionRequest, generation: _Generation, first: str | None, pieces: AsyncIterator[str]
) -> AsyncIterator[str]:
    """The answer as server-sent events."""
    place = new_place(asked)
    try:
        yield _event(chunk_of(asked, place, first or "", first=True))
        async for piece in pieces:
            yield _event(chunk_of(asked, place, piece))
        yield _event(chunk_of(asked, place, "", generation.reason))
        if asked.stream_options is not None and asked.stream_options.include_usage:
            yield _event({**chunk_of(asked, place, None), "usage": generation.usage()})
    except Exception as error:  # the status has been sent, and the client must be told all the same
        yield _event({"error": describe(message_of(error), "server_error", None)})
    yield "data: [DONE]\n\n"


def _event(values: dict[str, Any]) -> str:
    return f"data: {json.dumps(values, ensure_ascii=False)}\n\n"


async def _cancel_if_gone(request: Request, job: Job) -> None:
    """A client that has gone needs no answer."""
    while not await request.is_disconnected():
        await asyncio.sleep(0.2)
    job.cancelled.set()
