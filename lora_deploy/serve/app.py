"""The OpenAI API over an export: chat and completions, streamed or whole; `model` names the adapter."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException

from lora_deploy.errors import LoraDeployError, UsageError
from lora_deploy.integrity import find_adapters
from lora_deploy.run.generate import OnnxModel
from lora_deploy.run.pieces import Pieces
from lora_deploy.serve.engine import BusyError, ClosedError, Engine, Event, Job
from lora_deploy.serve.protocol import ChatRequest, CompletionRequest, chunk_of, new_place, response_of

__all__ = ["create_app"]

_logger = logging.getLogger(__name__)
_LARGEST_BODY = 4 << 20
_LARGEST_READ = 64 << 20
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
    base = name or model.directory.resolve().name
    if base in adapter_names(model):
        raise UsageError(
            "the base and an adapter have the same name", found=base, remedy="call the base something else: --name"
        )

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.engine = Engine(model, max_batch=max_batch, max_waiting=max_waiting)
        yield
        await asyncio.to_thread(app.state.engine.close)

    app = FastAPI(title="lora-deploy", lifespan=lifespan, docs_url=None, redoc_url=None)
    started = int(time.time())

    def names() -> list[str]:
        return list(dict.fromkeys([base, *adapter_names(model)]))

    def describe(model_name: str) -> dict[str, Any]:
        return {
            "id": model_name,
            "object": "model",
            "created": started,
            "owned_by": "lora-deploy",
            "parent": base if model_name != base else None,
        }

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [describe(one) for one in names()]}

    @app.get("/v1/models/{model_name:path}")
    async def one_model(model_name: str) -> dict[str, Any]:
        _check_name(model_name, names())
        return describe(model_name)

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
        _check_name(asked.model, names())
        adapter = asked.model if asked.model in adapter_names(model) else None
        generation = _Generation(model, asked.stops, len(prompt))
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

    _answer_errors(app)
    app.add_middleware(_Guard, api_key=api_key)
    return app


def adapter_names(model: OnnxModel) -> list[str]:
    """The adapters that there are now."""
    manifest = model.session.manifest
    if manifest is not None and manifest.branch == "hot-swap":
        return list(find_adapters(Path(model.directory)))
    return model.adapters.names


def _check_name(name: str, names: list[str]) -> None:
    if name not in names:
        raise HTTPException(404, f"the model {name!r} does not exist; there are: {', '.join(names)}")


class _Generation:
    """An answer on its way from the engine's thread to the event loop."""

    def __init__(self, model: OnnxModel, stops: list[str], prompt_tokens: int) -> None:
        self.reason: str | None = None
        self.tokens = 0
        self._prompt_tokens = prompt_tokens
        self._pieces = Pieces(model.tokenizer)
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
        yield _event({"error": _describe(_message(error), "server_error", None)})
    yield "data: [DONE]\n\n"


def _event(values: dict[str, Any]) -> str:
    return f"data: {json.dumps(values, ensure_ascii=False)}\n\n"


async def _cancel_if_gone(request: Request, job: Job) -> None:
    """A client that has gone needs no answer."""
    while not await request.is_disconnected():
        await asyncio.sleep(0.2)
    job.cancelled.set()


def _message(error: Exception) -> str:
    """What a client may know: not where the files of this machine are."""
    if isinstance(error, LoraDeployError):
        details = [f"{name}: {value}" for name, value in error.details.items() if name != "file"]
        return "; ".join([error.summary, *details])
    if isinstance(error, BusyError):
        return str(error)
    _logger.error("an answer failed", exc_info=error)
    return "the server failed to answer; its log says why"


def _describe(message: str, kind: str, code: str | None) -> dict[str, Any]:
    return {"message": message, "type": kind, "param": None, "code": code}


def _answer_errors(app: FastAPI) -> None:
    """Errors in OpenAI's form."""

    def respond(status: int, message: str, kind: str, code: str | None = None) -> JSONResponse:
        return JSONResponse({"error": _describe(message, kind, code)}, status)

    @app.exception_handler(UsageError)
    async def usage(_: Request, error: UsageError) -> JSONResponse:
        code = "context_length_exceeded" if "context" in error.summary else None
        return respond(400, _message(error), "invalid_request_error", code)

    @app.exception_handler(LoraDeployError)
    async def own(_: Request, error: LoraDeployError) -> JSONResponse:
        return respond(500, _message(error), "server_error")

    @app.exception_handler(Exception)
    async def unknown(_: Request, error: Exception) -> JSONResponse:
        return respond(500, _message(error), "server_error")

    @app.exception_handler(BusyError)
    async def busy(_: Request, error: BusyError) -> JSONResponse:
        if isinstance(error, ClosedError):
            return respond(503, str(error), "server_error")
        return respond(429, f"too many requests: {error}", "rate_limit_error", "rate_limit_exceeded")

    @app.exception_handler(HTTPException)
    async def http(_: Request, error: HTTPException) -> JSONResponse:
        code = "model_not_found" if error.status_code == 404 and "the model" in error.detail else None
        return respond(error.status_code, error.detail, "invalid_request_error", code)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        found = [f"{'.'.join(map(str, one['loc'][1:]))}: {one['msg']}".removeprefix(": ") for one in error.errors()]
        return respond(400, "; ".join(found), "invalid_request_error")


class _Guard:
    """Refuses requests without the key, and bodies that no prompt needs, before they are read."""

    def __init__(self, app: Any, api_key: str | None) -> None:
        self._app, self._key = app, api_key

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        if self._key is not None and scope["path"] != "/health":
            given = headers.get(b"authorization", b"")
            if not hmac.compare_digest(given, f"Bearer {self._key}".encode()):
                error = _describe("the API key is missing or wrong", "invalid_request_error", "invalid_api_key")
                await _read_body(receive, 0)
                await JSONResponse({"error": error}, 401)(scope, receive, send)
                return
        if scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        body = await _read_body(receive, _LARGEST_BODY)
        if body is None:
            error = _describe(f"the body is larger than {_LARGEST_BODY} bytes", "invalid_request_error", None)
            await JSONResponse({"error": error}, 413, {"Connection": "close"})(scope, receive, send)
            return
        read = False

        async def again() -> Any:
            nonlocal read
            if read:
                return await receive()
            read = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self._app(scope, again, send)


async def _read_body(receive: Any, largest: int) -> bytes | None:
    """The whole body; None where it is larger, however long it was said to be.

    What is too large is read to its end all the same, and not kept: a connection that is closed with bytes unread is
    reset, and the client never sees why. Beyond _LARGEST_READ bytes it is no mistake any more.
    """
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.request":
            size += len(message.get("body", b""))
            if size <= largest:
                parts.append(message.get("body", b""))
            else:
                parts.clear()
        if message["type"] != "http.request" or not message.get("more_body", False) or size > _LARGEST_READ:
            return b"".join(parts) if size <= largest else None
