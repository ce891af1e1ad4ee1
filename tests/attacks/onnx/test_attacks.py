"""Hostile graphs, metadata and adapters through the command line: exit 3, one message, nothing changed on disk."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from google.protobuf.message import DecodeError
from onnx import ModelProto, helper
from safetensors.torch import save_file

from lora_deploy.entries import FILES_ENTRY
from lora_deploy.integrity import SEAL_ENTRY, UNSEALED, hash_file, seal_bytes
from tests.attacks.onnx import adapters, graphs, make, manifests
from tests.attacks.onnx.make import CONVERT, DATA, HERE, INSPECT, RUN, VERIFY, VOCABULARY, WEIGHTS, WIDTH
from tests.commands import Command, Ended, assert_one_message, command, tree
from tests.faults.tally import Tally
from tests.run.conftest import byte_tokenizer

__all__ = ["command"]

GRAPHS, MANIFESTS, ADAPTERS = graphs.cases(), manifests.cases(), adapters.cases()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    byte_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture
def place(tmp_path: Path, tokenizer: Path) -> Path:
    """The honest export, its adapter, one in PEFT's format, and what a hostile file would reach for."""
    root = tmp_path / "place"
    out, peft = root / "out", root / "peft"
    (out / "adapters").mkdir(parents=True)
    peft.mkdir()
    for file in tokenizer.iterdir():
        (out / file.name).symlink_to(file)
    (out / "config.json").write_text("{}")
    (out / DATA).write_bytes(WEIGHTS)
    (out / "adapters" / "own.onnx_adapter").write_bytes(adapters.build(adapters.honest()))
    _publish(out, make.honest().SerializeToString())
    (root / "secret.bin").write_bytes(WEIGHTS)
    (out / "link.data").symlink_to("../secret.bin")
    (out / "folder").symlink_to("..")
    os.mkfifo(out / "fifo.data")
    halves = {"lora_A": torch.ones(2, WIDTH), "lora_B": torch.ones(VOCABULARY, 2)}
    save_file(
        {f"base_model.model.lin.{half}.weight": values for half, values in halves.items()},
        peft / "adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["lin"], "task_type": "CAUSAL_LM"}
    (peft / "adapter_config.json").write_text(json.dumps(config))
    return root


def _publish(out: Path, content: bytes) -> None:
    """Write a graph with a record of its files and a seal, as whoever made it could: neither is a signature."""
    with suppress(DecodeError):
        model = ModelProto.FromString(content)
        own = {entry.key: entry.value for entry in model.metadata_props}
        files = {path.relative_to(out).as_posix(): path for path in out.rglob("*") if path.is_file()}
        files.pop("model.onnx", None)
        more = {FILES_ENTRY: json.dumps({name: hash_file(file) for name, file in files.items()})}
        added = {key: value for key, value in (more | {SEAL_ENTRY: UNSEALED}).items() if key not in own}
        end = ModelProto()
        helper.set_model_props(end, added)
        content = seal_bytes("model.onnx", content + end.SerializeToString())  # more of a repeated field
    (out / "model.onnx").write_bytes(content)


def _do(command: Command, asked: str, place: Path, adapter: str | None = None) -> Ended:
    out = place / "out"
    if asked == RUN:
        chosen = ("--adapter", adapter) if adapter else ()
        return command("run", out, "--prompt", "Hi", "--max-new-tokens", "2", "--quiet", *chosen)
    if asked == VERIFY:
        return command("verify", out, "--quiet")
    if asked == INSPECT:
        return command("adapter", "inspect", out / "adapters" / f"{adapter}.onnx_adapter", "--quiet")
    return command("adapter", "convert", place / "peft", "--export", out, "--quiet", "--name", "new")


def _assert_refused(
    command: Command,
    commands: tuple[str, ...],
    place: Path,
    count: Callable[[bool], object],
    adapter: str | None = None,
) -> None:
    before = tree(place)
    for asked in commands:
        ended = _do(command, asked, place, adapter)
        one = ended.err.startswith("lora-deploy: ") and ended.err.count("lora-deploy: ") == 1 and not ended.out
        count(ended.code == 3 and one and "Traceback" not in ended.err and tree(place) == before)
        assert_one_message(ended, 3)
        assert ended.err.replace("\n", "").isprintable()  # a terminal obeys the rest
        assert tree(place) == before


def test_the_honest_files_are_what_the_hostile_ones_are_made_of(place: Path, command: Command) -> None:
    """Each command takes them, but for the adapter, which verify does not find."""
    bare, adapted = (_do(command, RUN, place, adapter) for adapter in (None, "own"))
    assert bare.code == adapted.code == 0, bare.err + adapted.err
    assert bare.out != adapted.out
    assert _do(command, INSPECT, place, "own").code == 0
    assert _do(command, CONVERT, place).code == 0
    assert_one_message(_do(command, VERIFY, place), 2, "not known where the adapter", "own", "--adapter own=DIR")


@pytest.mark.parametrize("name", GRAPHS)
def test_a_hostile_graph(name: str, place: Path, command: Command, tally: Tally) -> None:
    _publish(place / "out", (HERE / "graphs" / f"{name}.onnx").read_bytes())
    _assert_refused(command, GRAPHS[name].commands, place, lambda survived: tally("hostile ONNX graph", survived))


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_hostile_manifest(name: str, place: Path, command: Command, tally: Tally) -> None:
    model = make.honest()
    lies = json.loads((HERE / "manifests" / f"{name}.json").read_text(encoding="utf-8"))
    entries = {key: value for key, value in (make.metadata() | lies).items() if value is not None}
    helper.set_model_props(model, entries)
    _publish(place / "out", model.SerializeToString())
    _assert_refused(command, MANIFESTS[name].commands, place, lambda survived: tally("hostile manifest", survived))


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_hostile_adapter(name: str, place: Path, command: Command, tally: Tally) -> None:
    content = (HERE / "adapters" / f"{name}.onnx_adapter").read_bytes()
    (place / "out" / "adapters" / "evil.onnx_adapter").write_bytes(content)
    commands = ADAPTERS[name].commands
    _assert_refused(command, commands, place, lambda survived: tally("hostile .onnx_adapter", survived), "evil")


@pytest.mark.parametrize("kind", ["directory", "pipe", "3 GiB of nothing", "link to nothing", "link in a circle"])
def test_a_model_that_is_no_file(kind: str, place: Path, command: Command, tally: Tally) -> None:
    file = place / "out" / "model.onnx"
    file.unlink()
    if kind == "directory":
        file.mkdir()
    elif kind == "pipe":
        os.mkfifo(file)
    elif kind == "3 GiB of nothing":
        with open(file, "wb") as opened:
            opened.truncate(3 << 30)
    else:
        file.symlink_to("model.onnx" if "circle" in kind else "nothing")
    for asked in make.ALL:
        ended = _do(command, asked, place)
        tally("hostile ONNX graph", ended.code == 3)
        assert_one_message(ended, 3, file)


def test_every_file_is_what_its_maker_makes_and_small() -> None:
    for directory, cases in (("graphs", GRAPHS), ("manifests", MANIFESTS), ("adapters", ADAPTERS)):
        files = {file.stem: file.read_bytes() for file in (HERE / directory).iterdir()}
        assert files == {name: case.content for name, case in cases.items()}
        assert max(map(len, files.values())) < 8192
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    assert all(f"/{name}." in readme for name in (*GRAPHS, *MANIFESTS, *ADAPTERS))


def test_the_check_of_a_graph_as_large_as_real_ones_is_quick() -> None:
    """5,000 nodes and tensors: some milliseconds; the bound is for a busy machine."""
    import time

    from lora_deploy.graph_check import check_graph

    model = ModelProto.FromString(make.honest().SerializeToString())
    for number in range(5000):
        model.graph.initializer.append(make.inline(f"t{number}", (64,), b"\0" * 256))
        model.graph.node.append(helper.make_node("Add", ["x", f"t{number}"], [f"y{number}"]))
    for tensor in model.graph.initializer[:2]:
        tensor.CopyFrom(make.inline(tensor.name, (0,)))
    begun = time.process_time()
    check_graph(model, HERE / "model.onnx")
    assert time.process_time() - begun < 1
