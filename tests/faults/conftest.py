"""A base, an adapter and an output that a test may damage, the command that exports them, and processes with faults."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.commands import Command, Ended, command
from tests.conftest import CheckpointFactory
from tests.export.conftest import adapter_dir, branch_export, tiny_export
from tests.faults.forks import Faulty, build_shim, start_server
from tests.faults.scenes import SceneFactory, make_scenes
from tests.faults.training import Training
from tests.train.conftest import tiny_base

__all__ = ["Place", "adapter_dir", "branch_export", "command", "place", "tiny_base", "tiny_export"]


class Place(NamedTuple):
    """A directory with everything that an export reads and writes."""

    root: Path
    base: Path
    adapter: Path
    output: Path
    command: Command

    def export(self, *more: object, quantization: str | None = "nf4") -> Ended:
        """Export the adapter, merged; later arguments win."""
        asked = ("--model", self.base, "--adapter", self.adapter, "--output", self.output, "--merge", "--quiet")
        method = ("--quantization", quantization) if quantization else ()
        return self.command("export", *asked, *method, *more)


@pytest.fixture
def place(
    checkpoint_dir: CheckpointFactory, adapter_dir: Callable[..., Path], command: Command, tmp_path: Path
) -> Place:
    """Copies of a dense Llama and its adapter, and a place for the output."""
    root = tmp_path / "place"
    base = Path(shutil.copytree(checkpoint_dir("llama"), root / "base"))
    adapter = Path(shutil.copytree(adapter_dir("llama"), root / "adapter"))
    return Place(root, base, adapter, root / "out", command)


@pytest.fixture(scope="session")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library that puts faults into calls of libc."""
    if not sys.platform.startswith("linux") or shutil.which("cc") is None:
        pytest.skip("faults are put into calls by a library: Linux and a C compiler")
    return build_shim(tmp_path_factory.mktemp("shim"))


@pytest.fixture(scope="session")
def faulty(shim: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Faulty]:
    """`faulty.run(*argv, arm=Fault(...))`: a command line as a process with a fault in it."""
    with start_server(shim, tmp_path_factory.mktemp("faulty")) as server:
        yield server


@pytest.fixture(scope="session")
def otherwise_hashed(shim: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Faulty]:
    """The same, where sets of strings have another order."""
    with start_server(shim, tmp_path_factory.mktemp("otherwise"), hash_seed=1) as server:
        yield server


@pytest.fixture(scope="session")
def scene(tiny_base: Callable[..., str], faulty: Faulty, tmp_path_factory: pytest.TempPathFactory) -> SceneFactory:
    """`scene(kind, new=False)`: an export to break off, over an older one unless it is new."""
    return make_scenes(Path(tiny_base()), faulty, tmp_path_factory)


@pytest.fixture(scope="session")
def short_training(tiny_base: Callable[..., str], faulty: Faulty, tmp_path_factory: pytest.TempPathFactory) -> Training:
    """A training run to break off; made once."""
    return Training(Path(tiny_base()), tmp_path_factory.mktemp("training"), faulty)


@pytest.fixture
def training(short_training: Training) -> Training:
    """The same, as it is before it begins."""
    short_training.reset()
    return short_training
