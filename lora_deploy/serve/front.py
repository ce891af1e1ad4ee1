"""What every server of ours has in front: which models there are, the key, bodies, errors in OpenAI's form."""

from __future__ import annotations

import hmac
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from lora_deploy.errors import LoraDeployError, UsageError
from lora_deploy.integrity import find_adapters
from lora_deploy.manifest import Manifest
from lora_deploy.serve.engine import BusyError, ClosedError

__all__ = ["adapter_names", "check_name", "create_front", "describe", "message_of"]

_logger = logging.getLogger(__name__)
_LARGEST_BODY = 4 << 20
_LARGEST_READ = 64 << 20


def create_front(
    directory: Path, manifest: Manifest | None, *, name: str | None, api_key: str | None, lifespan: Any = None
) -> FastAPI:
    """An application without answers yet: `/health`, `/v1/models`, the key, and errors.

    Args:
        directory: The export.
        manifest: What its graph says of itself; None where lora-deploy did not make it.
        name: What the base, or a model that is one for good, is called; None for the name of its directory.
        api_key: What clients must send; None to ask for nothing.
        lifespan: Of the application, as FastAPI takes it.

    Returns:
        The application. Its `state.names` gives the models that there are now, the base first.

    Raises:
        UsageError: The base is called as one of its adapters.
    """
    base = name or directory.resolve().name
    if base in adapter_names(directory, manifest):
        raise UsageError(
            "the base and an adapter have the same name", found=base, remedy="call the base something else: --name"
        )

    def names() -> list[str]:
        return list(dict.fromkeys([base, *adapter_names(directory, manifest)]))

    app = FastAPI(title="lora-deploy", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.names = names
    _add_models(app, base, names)
    _answer_errors(app)
    app.add_middleware(_Guard, api_key=api_key)
    return app


def adapter_names(directory: Path, manifest: Manifest | None) -> list[str]:
    """The adapters that there are now."""
    if manifest is not None and manifest.branch == "hot-swap":
        return list(find_adapters(directory))
    return list(manifest.pool) if manifest is not None and manifest.branch == "pooled" else []


def check_name(name: str, names: list[str]) -> None:
    """Answer 404 where a model does not exist."""
    if name not in names:
        raise HTTPException(404, f"the model {name!r} does not exist; there are: {', '.join(names)}")


def _add_models(app: FastAPI, base: str, names: Callable[[], list[str]]) -> None:
    started = int(time.time())

    def describe_model(model_name: str) -> dict[str, Any]:
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
        return {"object": "list", "data": [describe_model(one) for one in names()]}

    @app.get("/v1/models/{model_name:path}")
    async def one_model(model_name: str) -> dict[str, Any]:
        check_name(model_name, names())
        return describe_model(model_name)


def message_of(error: Exception) -> str:
    """What a client may know: not where the files of this machine are."""
    if isinstance(error, LoraDeployError):
        details = [f"{name}: {value}" for name, value in error.details.items() if name != "file"]
        return "; ".join([error.summary, *details])
    if isinstance(error, BusyError):
        return str(error)
    _logger.error("an answer failed", exc_info=error)
    return "the server failed to answer; its log says why"


def describe(message: str, kind: str, code: str | None) -> dict[str, Any]:
    """An error as OpenAI describes it."""
    return {"message": message, "type": kind, "param": None, "code": code}


def _answer_errors(app: FastAPI) -> None:
    """Errors in OpenAI's form."""

    def respond(status: int, message: str, kind: str, code: str | None = None) -> JSONResponse:
        return JSONResponse({"error": describe(message, kind, code)}, status)

    @app.exception_handler(UsageError)
    async def usage(_: Request, error: UsageError) -> JSONResponse:
        code = "context_length_exceeded" if "context" in error.summary else None
        return respond(400, message_of(error), "invalid_request_error", code)

    @app.exception_handler(LoraDeployError)
    async def own(_: Request, error: LoraDeployError) -> JSONResponse:
        return respond(500, message_of(error), "server_error")

    @app.exception_handler(Exception)
    async def unknown(_: Request, error: Exception) -> JSONResponse:
        return respond(500, message_of(error), "server_error")

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
    """Refuses requests without the key, and bodies that no prompt needs, before anything makes sense of them."""

    def __init__(self, app: Any, api_key: str | None) -> None:
        self._app, self._key = app, api_key

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        if self._key is not None and scope["path"].removeprefix(scope.get("root_path", "")) != "/health":
            given = headers.get(b"authorization", b"")
            if not hmac.compare_digest(given, f"Bearer {self._key}".encode()):
                error = describe("the API key is missing or wrong", "invalid_request_error", "invalid_api_key")
                await _read_body(receive, 0)
                await JSONResponse({"error": error}, 401)(scope, receive, send)
                return
        if scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        body = await _read_body(receive, _LARGEST_BODY)
        if body is None:
            error = describe(f"the body is larger than {_LARGEST_BODY} bytes", "invalid_request_error", None)
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
    body = bytearray()  # not a list: a body may come in pieces of a byte
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.request":
            size += len(message.get("body", b""))
            if size <= largest:
                body += message.get("body", b"")
            else:
                body.clear()
        if message["type"] != "http.request" or not message.get("more_body", False) or size > _LARGEST_READ:
            return bytes(body) if size <= largest else None
