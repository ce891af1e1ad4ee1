"""`lora-deploy serve` as a process."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.commands import Command, assert_one_message, command

__all__ = ["command"]

SERVE = [sys.executable, "-m", "lora_deploy", "serve"]


def test_it_serves_until_it_is_interrupted(talking_branch: Callable[..., Path]) -> None:
    place = talking_branch("hot-swap")
    run = [*SERVE, str(place), "--port", "0", "--name", "base"]
    with subprocess.Popen(run, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        url = None
        while url is None:
            line = server.stderr.readline()
            assert line, "it ended"
            url = re.search(r"http://127\.0\.0\.1:\d+", line)
        asked = urllib.request.Request(
            f"{url[0]}/v1/chat/completions",
            json.dumps({"model": "a", "max_tokens": 3, "messages": [{"role": "user", "content": "Hi"}]}).encode(),
            {"Content-Type": "application/json"},
        )
        assert json.load(urllib.request.urlopen(asked))["usage"]["completion_tokens"] <= 3
        server.send_signal(signal.SIGINT)
        left = server.stderr.read()
        assert "Traceback" not in left
        assert server.wait(60) == 130


def test_a_port_that_is_taken(talking_branch: Callable[..., Path], command: Command) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ended = command("serve", talking_branch("hot-swap"), "--port", port)
    assert ended.code == 2
    assert f"127.0.0.1:{port}" in ended.err
    assert "Traceback" not in ended.err


def test_without_its_packages_it_says_what_to_install(
    talking_branch: Callable[..., Path], command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "uvicorn" else find(name, *rest)
    )
    assert_one_message(command("serve", talking_branch("hot-swap")), 2, "uvicorn", "[cpu,serve]")


def test_what_is_no_export_is_refused(tmp_path: Path, command: Command) -> None:
    assert_one_message(command("serve", tmp_path), 3, tmp_path)
