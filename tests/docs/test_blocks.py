"""Every code block of the README and of docs/, run as it stands, on a model of the same name that is tiny."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from lora_deploy import cli
from tests.conftest import save_tiny
from tests.docs.blocks import LANGUAGES, Block, given_things, read_blocks
from tests.run.conftest import byte_tokenizer

ROOT = Path(__file__).parents[2]
FILES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


def run_blocks(file: Path) -> list[Block]:
    """Those that are run."""
    return [block for block in read_blocks(file) if block.language in LANGUAGES and block.not_run is None]


def run(*arguments: object) -> None:
    """Run `lora-deploy` in this process; it must succeed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["lora-deploy", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
    assert ended.value.code == 0, shlex.join(map(str, arguments))


def _train(output: str, rank: int) -> None:
    rest = ("--quantization", "nf4", "--rank", rank, "--alpha", 2 * rank, "--max-steps", 8, "--learning-rate", 3e-2)
    run("train", "--model", MODEL, "--data", "train.jsonl", "--output", output, "--quiet", *rest)


def _export(output: str, *options: str) -> None:
    run("export", "--model", MODEL, "--output", output, "--quiet", *options)


# What docs call by name.
THINGS: dict[str, Callable[[], None]] = {
    "adapter": lambda: _train("adapter", 16),
    "other-adapter": lambda: _train("other-adapter", 8),
    "deployed": lambda: _export("deployed", "--adapter", "adapter", "--merge"),
    "served": lambda: _export("served", "--adapter", "json=adapter", "--branch"),
    "pooled": lambda: _export(
        "pooled", "--adapter", "json=adapter", "--adapter", "other=other-adapter", "--branch", "--pool"
    ),
}


@pytest.fixture(scope="module")
def things(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the model, data, and what is made of them; made once, to be copied."""
    directory = tmp_path_factory.mktemp("things")
    save_tiny("llama", "none", directory / MODEL, vocab_size=260, max_position_embeddings=1024)
    byte_tokenizer().save_pretrained(directory / MODEL)
    rows = [
        {"prompt": f"Tell Anna to call at {hour} am.", "completion": f'{{"time": {hour}}}'} for hour in range(1, 25)
    ]
    (directory / "train.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return directory


@contextmanager
def inside(directory: Path) -> Iterator[None]:
    """In this directory, as in a shell."""
    before = Path.cwd()
    os.chdir(directory)
    try:
        yield
    finally:
        os.chdir(before)


@pytest.mark.parametrize("file", list(filter(run_blocks, FILES)), ids=lambda file: file.name)
def test_every_block_runs(file: Path, things: Path, tmp_path: Path) -> None:
    blocks = run_blocks(file)
    wanted = [name for name in THINGS if name in given_things(file)]
    with inside(things):
        for name in wanted:
            if not Path(name).exists():
                THINGS[name]()
    directory = tmp_path / "here"
    directory.mkdir()
    for name in (MODEL, "train.jsonl", *wanted):
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if (things / name).is_dir() else shutil.copy2)(things / name, directory / name)
    variables: dict[str, Any] = {"__name__": "__main__"}
    with inside(directory), ExitStack() as servers:
        for block in blocks:
            print(block.place)  # shown where it fails
            if "lora-deploy web" in block.code and shutil.which("npm") is None:
                continue
            if block.background:
                servers.enter_context(serving(block))
            elif block.language == "python":
                exec(compile(block.prelude, f"{block.place}, given", "exec"), variables)
                exec(compile(block.code, block.place, "exec"), variables)
            else:
                run_shell(block.code)


def run_shell(code: str) -> None:
    """Run a block of commands: ours in this process, others by a shell."""
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["lora-deploy"]:
            run(*words[1:])
        elif words:
            subprocess.run(["bash", "-ec", line], check=True, env=_environment(), timeout=300)


def _environment() -> dict[str, str]:
    return {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


@contextmanager
def serving(block: Block) -> Iterator[None]:
    """The server of a block, from when it answers."""
    words = shlex.split(block.code.replace("\\\n", " "), comments=True)
    port = int(words[words.index("--port") + 1]) if "--port" in words else 8000
    assert words[0] == "lora-deploy", block.place
    process = subprocess.Popen([sys.executable, "-m", "lora_deploy", *words[1:]])
    try:
        for _ in range(600):
            assert process.poll() is None, block.place
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        else:
            pytest.fail(f"{block.place} does not answer")
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{'/health' if words[1] == 'serve' else ''}") as answer:
            assert answer.status == 200
        yield
    finally:
        process.terminate()
        process.wait(30)


def test_what_is_not_run_says_why() -> None:
    blocks = [block for file in FILES for block in read_blocks(file)]
    languages = {block.language for block in blocks}
    assert languages <= {"", *LANGUAGES, "yaml", "json"}
    assert all(block.not_run is None or len(block.not_run) > 10 for block in blocks)
    run = [block for block in blocks if block.language in LANGUAGES and block.not_run is None]
    left_out = [block for block in blocks if block.language in LANGUAGES and block.not_run is not None]
    assert len(run) > len(left_out)


def test_every_link_leads_somewhere() -> None:
    broken = []
    for file in FILES:
        for target in re.findall(r"\]\(([^)\s]+)\)", file.read_text(encoding="utf-8")):
            path, _, anchor = target.partition("#")
            if "://" in target:
                continue
            place = (file.parent / path).resolve() if path else file
            if not place.exists() or (anchor and anchor not in _anchors(place)):
                broken.append(f"{file.name}: {target}")
    assert not broken


def _anchors(file: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
