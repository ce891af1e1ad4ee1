"""A server of a page for this machine: with the headers that let onnxruntime-web use several threads."""

from __future__ import annotations

import sys
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from lora_deploy.errors import UsageError

__all__ = ["ISOLATION", "make_server"]

# Only a page that is isolated from others is given memory that threads share.
ISOLATION = {"Cross-Origin-Opener-Policy": "same-origin", "Cross-Origin-Embedder-Policy": "require-corp"}


class _Handler(SimpleHTTPRequestHandler):
    extensions_map = {  # noqa: RUF012 - http.server's own declaration is of a class
        **SimpleHTTPRequestHandler.extensions_map,
        ".js": "text/javascript",
        ".mjs": "text/javascript",
        ".wasm": "application/wasm",
    }

    def end_headers(self) -> None:
        for name, value in ISOLATION.items():
            self.send_header(name, value)
        super().end_headers()

    def log_message(self, *_: object) -> None:
        pass


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that goes in the middle of a file is no error of the server's."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


def make_server(directory: str | Path, port: int = 0, host: str = "127.0.0.1") -> ThreadingHTTPServer:
    """Make a server of a page, which answers once its `serve_forever` runs.

    Args:
        directory: What `write_page` wrote.
        port: To listen at; 0 for one that is free.
        host: Address to listen at.

    Raises:
        UsageError: The port is taken, or the host is none of this machine.
    """
    try:
        return _Server((host, port), partial(_Handler, directory=str(directory)))
    except (OSError, OverflowError) as error:
        raise UsageError(
            "the server could not start",
            found=f"{host}:{port}: {getattr(error, 'strerror', None) or error}",
            remedy="choose another --port",
        ) from error
