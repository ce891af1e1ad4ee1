"""Serve an export from several processes or machines, as an application of Ray Serve. Needs the extra `ray`.

    serve run lora_deploy.serve.ray:app directory=OUT replicas=2

One deployment, `Front`, takes the requests of OpenAI's API; each replica of the other, `Model`, has the export open and
answers as `lora-deploy serve` does. A request goes to a replica that has run its adapter already, as long as one has
room (Ray Serve's model multiplexing): of a hot-swap export only requests for the same adapter are decoded together.
"""

# Not `from __future__ import annotations`: Ray wants the class that `app` takes, not its name.

import asyncio
import json
import os
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

import ray
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.serve.exceptions import BackPressureError
from starlette.types import Message

from lora_deploy.integrity import MODEL_NAME
from lora_deploy.manifest import Manifest, read_metadata
from lora_deploy.run.generate import OnnxModel
from lora_deploy.run.session import Weights
from lora_deploy.serve.app import create_app
from lora_deploy.serve.engine import BusyError
from lora_deploy.serve.front import check_name, create_front

__all__ = ["Arguments", "app"]

_ADAPTERS = 64  # that a replica is known for; it keeps as many where it runs
_STREAMS = 10_000  # answers that one front passes on at once
_Count = Annotated[int, Field(ge=1)]


class Arguments(BaseModel):
    """What `app` is built with: on the command line of `serve run`, or as `args` in a file for `serve deploy`.

    Attributes:
        directory: What export wrote, at the same place on every machine.
        name: What the base, or a model that is one for good, is called; None for the name of its directory.
        api_key: What clients must send; LORA_DEPLOY_API_KEY where it is not said. None to ask for nothing.
        max_batch: Answers that a replica writes together at most. It is given as many again, which are next in line.
        max_waiting: Requests that wait for a replica at most; more get the status 429.
        weights: How weights that are kept as codes run, as `OnnxModel` takes it.
        provider: "cpu" or "cuda".
        replicas: Processes that have the export open.
        cpus: Processors that Ray keeps for each of them, and threads that it runs.
        gpus: GPUs that Ray keeps for each; None for one with "cuda".
    """

    model_config = ConfigDict(extra="forbid")

    directory: Path
    name: str | None = None
    api_key: str | None = Field(default_factory=lambda: os.environ.get("LORA_DEPLOY_API_KEY"), repr=False)
    max_batch: _Count = 8
    max_waiting: _Count = 256
    weights: Weights = "stored"
    provider: Literal["cpu", "cuda"] = "cpu"
    replicas: _Count = 1
    cpus: _Count = 1
    gpus: float | None = None


def app(arguments: Arguments) -> serve.Application:
    """Build the application.

    Args:
        arguments: Which export, and how. What Ray has more options for (`num_replicas: auto`, ...) can be said of the
            deployments `Front` and `Model` in a configuration file of Ray Serve's.
    """
    arguments = arguments.model_copy(update={"directory": arguments.directory.absolute()})
    gpus = arguments.gpus if arguments.gpus is not None else float(arguments.provider == "cuda")

    def build() -> FastAPI:
        return _create_front(arguments)

    front = serve.deployment(
        serve.ingress(build)(),
        name="Front",
        max_ongoing_requests=_STREAMS,
        ray_actor_options={"num_cpus": 0},
    )
    model = serve.deployment(
        _Model,
        name="Model",
        num_replicas=arguments.replicas,
        max_ongoing_requests=2 * arguments.max_batch,
        max_queued_requests=arguments.max_waiting,
        ray_actor_options={"num_cpus": arguments.cpus, "num_gpus": gpus},
    )
    return front.bind(model.bind(arguments))


def _create_front(arguments: Arguments) -> FastAPI:
    """What takes the requests: it knows which models there are, and has no model open."""
    metadata = read_metadata(arguments.directory)
    manifest = (
        Manifest.read(metadata, arguments.directory / MODEL_NAME) if "lora_deploy.precision" in metadata else None
    )
    front = create_front(arguments.directory, manifest, name=arguments.name, api_key=arguments.api_key)
    swaps = manifest is not None and manifest.branch == "hot-swap"
    model = serve.get_deployment_handle("Model").options(method_name="answer", stream=True)

    @front.post("/v1/chat/completions", response_model=None)
    @front.post("/v1/completions", response_model=None)
    async def answer(request: Request) -> StreamingResponse:
        body = await request.body()
        name = _model_of(body)
        if name is not None:
            check_name(name, front.state.names())
        adapter = name if swaps and name is not None and name != front.state.names()[0] else ""
        response = model.options(multiplexed_model_id=adapter).remote(request.scope["route"].path, body)
        try:
            status, headers = await anext(response)
        except BackPressureError as error:
            raise BusyError(f"{arguments.max_waiting} requests are waiting") from error
        return StreamingResponse(_pass_on(response), status, dict(headers))

    return front


def _model_of(body: bytes) -> str | None:
    """The model that a request names; None where it is not one that can be read, which `Model` says better."""
    try:
        name = json.loads(body)["model"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return name if isinstance(name, str) else None


async def _pass_on(response: Any) -> AsyncIterator[bytes]:
    try:
        async for part in response:
            yield part
    finally:
        response.cancel()  # of an answer that nobody reads any more; of one that has ended it does nothing


class _Model:
    """One process that has the export open, and answers as `lora-deploy serve` does."""

    async def __init__(self, arguments: Arguments) -> None:  # type: ignore[misc]  # Ray awaits it
        context = ray.get_runtime_context()
        model = OnnxModel(
            arguments.directory,
            provider=arguments.provider,
            weights=arguments.weights,
            threads=max(1, int(context.get_assigned_resources().get("CPU", 1))),
        )
        self._app = create_app(model, name=arguments.name, max_batch=arguments.max_batch)
        self._runs = self._app.router.lifespan_context(self._app)
        await self._runs.__aenter__()
        self._replica = serve.get_replica_context().replica_id.unique_id

    @serve.multiplexed(max_num_models_per_replica=_ADAPTERS)  # type: ignore[untyped-decorator]
    async def _hold(self, adapter: str) -> str:
        """Tells Ray that requests for an adapter are well here. The engine reads it, when it is next in line."""
        return adapter

    async def answer(self, path: str, body: bytes) -> AsyncIterator[Any]:
        """Answer a request that was posted.

        Args:
            path: The request's.
            body: The request's.

        Yields:
            First (status, [(name, value) of each header]), then the body in parts, bytes.
        """
        if adapter := serve.get_multiplexed_model_id():
            await self._hold(adapter)
        sent: asyncio.Queue[Message | None] = asyncio.Queue()
        task = asyncio.create_task(_call(self._app, path, body, sent))
        try:
            while (message := await sent.get()) is not None:
                if message["type"] == "http.response.start":
                    headers = [(name.decode(), value.decode()) for name, value in message["headers"]]
                    yield message["status"], [*headers, ("x-replica", self._replica)]
                elif message.get("body"):
                    yield message["body"]
        finally:
            task.cancel()


async def _call(app: FastAPI, path: str, body: bytes, sent: asyncio.Queue[Message | None]) -> None:
    """Call an ASGI application; what it sends is followed by None."""
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": [(b"content-type", b"application/json")],
        "client": None,
        "server": None,
    }
    left: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        if not left:
            await asyncio.Event().wait()  # whoever does not want the answer any more cancels this
        return left.pop()

    try:
        with suppress(Exception):  # it has been logged, and the client has been told
            await app(scope, receive, sent.put)
    finally:
        sent.put_nowait(None)
