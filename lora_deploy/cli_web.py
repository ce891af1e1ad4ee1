"""`lora-deploy web`: an export as a page for the browser."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from lora_deploy.cli_adapter import Json, Quiet
from lora_deploy.terminal import make_console, print_json

__all__ = ["web"]


def web(
    directory: Annotated[Path, typer.Argument(help="What export wrote.", metavar="OUT")],
    page: Annotated[Path, typer.Argument(help="Directory of the page.", metavar="PAGE")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an older page.")] = False,
    serve: Annotated[bool, typer.Option("--serve", help="Serve it to this machine until Ctrl-C.")] = False,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to serve it at; 0 for a free one.")] = 8080,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Write a static page that runs an export in the browser, and swaps its adapters there."""
    from lora_deploy.web import make_server, write_page

    console = make_console(quiet, as_json)
    server = make_server(page, port) if serve else None  # a port that is taken, before anything is written
    with console.status("writing the page, the first time building it"):
        written = write_page(directory, page, overwrite=overwrite)
    if as_json:
        print_json(asdict(written))
    adapters = f", adapters {', '.join(written.adapters)}" if written.adapters else ""
    console.print(f"{page}: a page of {written.bytes / 1e6:,.0f} MB{adapters}", soft_wrap=True, markup=False)
    if server is not None:
        console.print(f"http://127.0.0.1:{server.server_port}", soft_wrap=True, markup=False)
        server.serve_forever()
