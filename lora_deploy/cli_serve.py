"""`lora-deploy serve`: an export behind the OpenAI API."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, cast

import typer

from lora_deploy.cli_run import HowWeights
from lora_deploy.errors import UsageError

if TYPE_CHECKING:
    from lora_deploy.run.session import Weights

__all__ = ["serve"]


def serve(
    directory: Annotated[Path, typer.Argument(help="What export wrote.", metavar="OUT")],
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 for every network.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen at.")] = 8000,
    name: Annotated[str | None, typer.Option(help="What the base is called. [default: its directory]")] = None,
    api_key: Annotated[
        str | None,
        typer.Option(envvar="LORA_DEPLOY_API_KEY", help="Key that clients must send. [default: none is asked for]"),
    ] = None,
    max_batch: Annotated[int, typer.Option(min=1, help="Answers that are written together at most.")] = 8,
    max_waiting: Annotated[int, typer.Option(min=1, help="Requests that wait at most; more are refused.")] = 256,
    weights: HowWeights = "stored",
    provider: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Serve an export: OpenAI's chat and completions; `model` names the adapter, also one that is converted later."""
    for package in ("fastapi", "uvicorn"):
        if importlib.util.find_spec(package) is None:
            raise UsageError(f"serving needs {package}", remedy='pip install "lora-deploy[cpu,serve]"')
    import uvicorn

    from lora_deploy.run import OnnxModel
    from lora_deploy.serve import create_app

    model = OnnxModel(directory, provider=cast("Literal['cpu', 'cuda']", provider), weights=cast("Weights", weights))
    app = create_app(model, name=name, api_key=api_key, max_batch=max_batch, max_waiting=max_waiting)
    level = os.environ.get("LORA_DEPLOY_LOG_LEVEL", "info")
    try:
        uvicorn.Server(uvicorn.Config(app, host=host, port=port, log_level=level, timeout_graceful_shutdown=5)).run()
    except SystemExit as ended:  # uvicorn has said why: the port is taken, or the host is none
        raise UsageError(
            "the server could not start", found=f"{host}:{port}", remedy="choose another --host or --port"
        ) from ended
