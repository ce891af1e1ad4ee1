"""What is written of a page, and what is refused."""

from __future__ import annotations

import json
import shutil
import socket
import threading
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from safetensors.numpy import load_file

from lora_deploy.errors import CheckpointError, LoraDeployError, OutputError, UsageError
from lora_deploy.export import export_onnx
from lora_deploy.integrity import MODEL_NAME
from lora_deploy.manifest import Manifest
from lora_deploy.run.adapter_files import read_onnx_adapter
from lora_deploy.web import bundle, make_server, page, write_page
from tests.commands import assert_one_message, tree


@pytest.fixture(autouse=True)
def program(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The page's program without Node.js: its files are copied as they are."""
    directory = tmp_path / "program"
    (directory / "assets").mkdir(parents=True)
    (directory / "index.html").write_text("<title>program</title>")
    (directory / "assets/a.wasm").write_bytes(b"\0asm")
    monkeypatch.setattr(page, "build_bundle", lambda: directory)
    return directory


def test_a_page_holds_the_export_for_clients_that_feed_every_input(
    talking_branch: Callable[..., Path], tmp_path: Path
) -> None:
    export = talking_branch("hot-swap")
    before = {path: path.stat().st_size for path in export.rglob("*")}
    written = write_page(export, tmp_path / "page")
    model = tmp_path / "page/model"
    described = json.loads((model / "model.json").read_text())
    manifest = Manifest.read(page.check_files(export), export / MODEL_NAME)
    graph = onnx.load(str(model / MODEL_NAME), load_external_data=False).graph
    assert not {tensor.name for tensor in graph.initializer} & {value.name for value in graph.input}
    given = {"input_ids", "attention_mask", *(one["name"] for one in described["slots"] + described["cache"])}
    given |= {"position_ids"} if described["has_position_ids"] else set()
    assert given == {value.name for value in graph.input}
    for adapter in described["adapters"]:
        found = load_file(model / adapter["file"]["file"])
        expected = read_onnx_adapter(export / "adapters" / f"{adapter['name']}.onnx_adapter", manifest)
        assert found.keys() == expected.keys()
        assert all(np.array_equal(found[name], values) for name, values in expected.items())
    data = [one["file"] for one in described["data"]]
    assert all((model / name).read_bytes() == (export / name).read_bytes() for name in data)
    assert written.bytes == sum(one["bytes"] for one in [*described["data"], described["graph"]])
    assert described["eos_token_ids"] == [2]
    assert "Cross-Origin-Embedder-Policy: require-corp" in (tmp_path / "page/_headers").read_text()
    assert {path: path.stat().st_size for path in export.rglob("*")} == before


def test_a_page_is_the_same_each_time(talking_branch: Callable[..., Path], tmp_path: Path) -> None:
    for name in ("first", "second"):
        write_page(talking_branch("hot-swap"), tmp_path / name)
    first, second = (
        {
            path.relative_to(tmp_path / name): path.read_bytes()
            for path in (tmp_path / name).rglob("*")
            if path.is_file()
        }
        for name in ("first", "second")
    )
    assert first == second


def test_a_page_is_replaced_whole_and_nothing_else_is(
    talking_branch: Callable[..., Path], talking_export: Callable[..., Any], program: Path, tmp_path: Path
) -> None:
    output = tmp_path / "page"
    write_page(talking_branch("hot-swap"), output)
    with pytest.raises(OutputError, match="there is a page already"):
        write_page(talking_export()[1], output)
    (program / "assets/a.wasm").rename(program / "assets/b.wasm")
    write_page(talking_export()[1], output, overwrite=True)
    assert [path.name for path in (output / "assets").iterdir()] == ["b.wasm"]
    assert not list((output / "model").glob("adapter-*"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["page", "program"]


@pytest.mark.parametrize("exchanges", [True, False])
def test_what_is_not_of_a_page_stays(
    exchanges: bool, talking_export: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if not exchanges:
        monkeypatch.setattr(page, "exchange", lambda staging, output: False)
    real, link = tmp_path / "site-1", tmp_path / "site"
    write_page(talking_export()[1], real)
    link.symlink_to(real)
    (real / "CNAME").write_text("example.org")
    (real / ".git").mkdir()
    (real / ".git/HEAD").write_text("main")
    (real / "assets/a.wasm").unlink()
    write_page(talking_export()[1], link, overwrite=True)
    assert link.is_symlink()
    assert (real / "assets/a.wasm").is_file()
    assert (real / "CNAME").read_text() == "example.org"
    assert (real / ".git/HEAD").read_text() == "main"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["program", "site", "site-1"]


@pytest.mark.parametrize("content", ["{}", '{"format": "layers-model"}', "not json", "[]"])
def test_nothing_of_somebody_else_is_replaced(
    content: str, talking_export: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "mine/model").mkdir(parents=True)
    (tmp_path / "mine/model/model.json").write_text(content)  # TensorFlow.js calls its own so
    before = tree(tmp_path)
    with pytest.raises(OutputError, match="something else is there"):
        write_page(talking_export()[1], tmp_path / "mine", overwrite=True)
    assert tree(tmp_path) == before
    write_page(talking_export()[1], tmp_path / "page")
    monkeypatch.chdir(tmp_path / "page")
    before = tree(tmp_path)
    with pytest.raises(OutputError, match="in one step"):
        write_page(talking_export()[1], ".", overwrite=True)
    assert tree(tmp_path) == before


def _damaged(talking_export: Callable[..., Any], root: Path) -> Path:
    export = Path(shutil.copytree(talking_export()[1], root / "damaged"))
    file = next(export.glob("*.data"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    return export


def test_what_a_browser_cannot_run_is_refused(
    talking_export: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    base, export = talking_export()
    half = export_onnx(base, output=tmp_path / "bf16", precision="bf16", provider="cuda", verify=False).output
    cases: list[tuple[Path, type[LoraDeployError], str]] = [
        (half, UsageError, "browsers have no bfloat16"),
        (_damaged(talking_export, tmp_path), CheckpointError, "damaged"),
        (tmp_path, CheckpointError, "no"),
    ]
    for directory, error, message in cases:
        with pytest.raises(error, match=message):
            write_page(directory, tmp_path / "page")
    monkeypatch.setattr(page, "_MOST_BYTES", 1000)
    with pytest.raises(UsageError, match="larger than the memory"):
        write_page(export, tmp_path / "page")
    assert not (tmp_path / "page").exists()


def test_without_node_there_is_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle, "_hash_source", lambda: "never built")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UsageError, match=r"built with Node\.js"):
        bundle.build_bundle()


def test_the_server_isolates_the_page(talking_export: Callable[..., Any], tmp_path: Path) -> None:
    write_page(talking_export()[1], tmp_path / "page")
    server = make_server(tmp_path / "page")
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        with pytest.raises(UsageError, match="could not start"):
            make_server(tmp_path / "page", server.server_port)
        with urllib.request.urlopen(f"http://127.0.0.1:{server.server_port}/assets/a.wasm") as answer:
            assert answer.headers["Content-Type"] == "application/wasm"
            assert answer.headers["Cross-Origin-Opener-Policy"] == "same-origin"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_the_command(command: Callable[..., Any], talking_branch: Callable[..., Path], tmp_path: Path) -> None:
    export = talking_branch("hot-swap")
    done = command("web", export, tmp_path / "page", "--json")
    assert json.loads(done.out)["adapters"] == ["a", "b"]
    assert (tmp_path / "page/index.html").is_file()
    assert_one_message(command("web", export, tmp_path / "page"), 5, "there is a page already", "--overwrite")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ended = command("web", export, tmp_path / "other", "--serve", "--port", port)
    assert_one_message(ended, 2, "the server could not start", port, "--port")
    assert not (tmp_path / "other").exists()
