"""The same input gives the same bytes, wherever it lies, whoever runs it, and in whatever order sets are walked."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lora_deploy.adapter import write_adapter
from tests.commands import tree
from tests.conftest import random_adapter, tiny_model
from tests.faults.forks import Faulty
from tests.faults.tally import Tally

KIND = "the same bytes again"
MODES = {
    "merge": ["--merge", "--adapter", "one=ADAPTERS/one"],
    "branch": ["--branch", "--adapter", "one=ADAPTERS/one", "--adapter", "two=ADAPTERS/two"],
    "int4": ["--merge", "--precision", "int4", "--adapter", "one=ADAPTERS/one"],
}
Make = Callable[[int], "Inputs"]


class Inputs:
    """Copies of a base and its adapters somewhere, and what surrounds the command there.

    Args:
        root: An empty directory.
        number: Decides all names.
        base, adapters: To copy.
    """

    def __init__(self, root: Path, number: int, base: Path, adapters: Path) -> None:
        self.here, self.output = root / f"here-{number}", root / ("deep/" * (number % 3)) / f"out-{number}"
        self.base, self.adapters = root / f"base-{number}", root / ("below/" * (number % 2)) / f"a{number}"
        shutil.copytree(base, self.base)
        shutil.copytree(adapters, self.adapters)
        self.here.mkdir()
        self.env = {"HOME": str(root), "USER": f"user{number}", "LOGNAME": f"user{number}"}
        self.env |= {"XDG_CACHE_HOME": str(root / "cache"), "TMPDIR": str(self.here), "TZ": f"UTC+{number}"}

    def command(self, mode: str) -> list[str]:
        """The command line; every other one has relative paths."""
        places = [self.base, self.adapters, self.output]
        if self.output.name[-1] in "13579":
            places = [Path(os.path.relpath(place, self.here)) for place in places]
        base, adapters, output = map(str, places)
        more = [part.replace("ADAPTERS", adapters) for part in MODES[mode]]
        return ["export", "--model", base, "--output", output, "--quantization", "nf4", "--quiet", *more]


@pytest.fixture
def inputs(tiny_base: Callable[..., str], tmp_path: Path) -> Make:
    """`inputs(number)`: the same base and adapters in places of their own."""
    adapters = tmp_path / "adapters"
    for seed, name in enumerate(("one", "two")):
        write_adapter(random_adapter(tiny_model("llama"), seed=30 + seed), adapters / name)

    def make(number: int) -> Inputs:
        root = tmp_path / f"machine {number}"
        root.mkdir()
        return Inputs(root, number, Path(tiny_base()), adapters)

    return make


def _differ(one: Path, other: Path) -> list[str]:
    """The names of what is in one directory only, or not the same in both."""
    first, second = tree(one), tree(other)
    return sorted(name for name in first | second if first.get(name) != second.get(name))


@pytest.mark.parametrize("mode", ["merge", "branch"])
def test_two_exports_are_the_same(
    mode: str, inputs: Make, faulty: Faulty, otherwise_hashed: Faulty, tally: Tally
) -> None:
    made = [inputs(0), inputs(1)]
    for one, server in zip(made, (faulty, otherwise_hashed), strict=True):
        ended = server.run(*one.command(mode), cwd=one.here, env=one.env)
        assert ended.code == 0, ended.err
    differ = _differ(made[0].output, made[1].output)
    tally(KIND, not differ)
    assert not differ


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_ten_exports_by_ten_processes_are_the_same(mode: str, inputs: Make, tally: Tally) -> None:
    first, wrong = None, []
    for number in range(10):
        one = inputs(number)
        env = os.environ | one.env | {"PYTHONHASHSEED": str(number), "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-m", "lora_deploy", *one.command(mode)]
        subprocess.run(command, check=True, cwd=one.here, env=env, stderr=subprocess.DEVNULL)
        first = first or one
        differ = _differ(first.output, one.output)
        tally(KIND, not differ)
        wrong += [f"{number}: {differ}"] if differ else []
    assert not wrong, "\n".join(wrong)
