"""The command line in this process, and what a directory holds before and after."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from lora_deploy.cli import main


class Ended(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


Command = Callable[..., Ended]


def run_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object) -> Ended:
    """Run `lora-deploy` with these arguments."""
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["lora-deploy", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    captured = capsys.readouterr()
    return Ended(int(ended.value.code or 0), captured.out, captured.err)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """`command(*arguments)`: run `lora-deploy` in this process."""
    return lambda *arguments: run_command(monkeypatch, capsys, *arguments)


def assert_one_message(ended: Ended, code: int, *named: object) -> None:
    """The command ended with this code and one message that holds all of `named`, and nothing else was printed."""
    assert ended.code == code, ended.err
    assert ended.out == ""
    assert ended.err.startswith("lora-deploy: ")
    assert ended.err.count("lora-deploy: ") == 1
    assert "Traceback" not in ended.err
    for text in named:
        assert str(text) in ended.err


def tree(directory: Path) -> dict[str, tuple[int, str]]:
    """Size and hash of everything below a directory, hidden files included; sub-directories too."""
    found = {}
    for path in sorted(directory.rglob("*")):
        content = path.read_bytes() if path.is_file() else b"directory"
        found[str(path.relative_to(directory))] = (len(content), hashlib.sha256(content).hexdigest())
    return found
