"""A browser, and exports to show it."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from lora_deploy.errors import UsageError
from lora_deploy.web import make_server
from lora_deploy.web.bundle import build_bundle
from tests.commands import command
from tests.run.conftest import talking, talking_branch, talking_export

__all__ = ["Opened", "command", "opened", "talking", "talking_branch", "talking_export"]

# It looks for its maker's servers otherwise, at every start.
_QUIET = (
    "--no-sandbox",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
_GPU = ("--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader", "--enable-features=Vulkan")
Opened = Callable[..., AbstractContextManager[Any]]


@pytest.fixture(scope="session")
def opened() -> Opened:
    """`with opened(directory, gpu=False) as page`: a page in a headless Chromium, once its model is loaded."""
    api = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    if shutil.which("npm") is None:
        pytest.skip("no npm, which builds the page: install Node.js")
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with api.sync_playwright() as playwright:
        chromium = found or playwright.chromium.executable_path
    if not Path(chromium).is_file():
        pytest.skip("no Chromium: .ci/chromium installs it")
    try:
        build_bundle()
    except UsageError as error:
        pytest.skip(f"the page cannot be built here: {error.summary}")

    @contextmanager
    def open_page(directory: Path, *, gpu: bool = False, wait: bool = True) -> Iterator[Any]:
        server = make_server(directory)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            with api.sync_playwright() as playwright:
                browser = playwright.chromium.launch(executable_path=chromium, args=[*_QUIET, *(_GPU if gpu else ())])
                page = browser.new_page(viewport={"width": 900, "height": 700})
                page.goto(f"http://127.0.0.1:{server.server_port}/")
                if wait:
                    page.wait_for_selector("body[data-state=ready]", timeout=120_000)
                yield page
                browser.close()
        finally:
            server.shutdown()
            thread.join()
            server.server_close()

    return open_page
