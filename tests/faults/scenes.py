"""An output directory before and after a command, so that whatever breaks it off in between can be judged.

The output stands alone in its parent: whatever else is there afterwards was left behind.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from lora_deploy.adapter import write_adapter
from tests.commands import tree
from tests.conftest import random_adapter, tiny_model
from tests.faults.forks import ANY, Call, Ended, Fault, Faulty, Running

__all__ = ["Scene", "SceneFactory", "assert_one_message_or_none", "make_scenes"]

SceneFactory = Callable[..., "Scene"]
Tree = dict[str, tuple[int, str]]
_WAYS = {
    "merge": ["--merge", "--no-verify"],
    "verified": ["--merge"],
    "int4": ["--merge", "--precision", "int4", "--calibration-rows", "0", "--no-verify"],
    "branch": ["--branch", "--no-verify"],
    "fixed": ["--branch", "--fixed", "--no-verify"],
    "convert": ["--branch", "--no-verify"],
}


class Scene:
    """A command that replaces an output, as often as it is asked to.

    Args:
        kind: "merge", "verified" (merged), "int4" (merged), "branch" (hot-swap) or "fixed" to export, "convert" to
            add an adapter to a hot-swap export. Over an older branch, the base's file is kept.
        new: Whether nothing is there before.
        base: Of all exports.
        root: An empty directory.
        faulty: Runs the command.
        exchange: As in `Fault`.

    Attributes:
        place: The parent of the output.
        output: The output.
        before, after: What is in it before the command, and after an undisturbed one.
        calls: The calls of the undisturbed one that change files.
    """

    def __init__(self, kind: str, new: bool, base: Path, root: Path, faulty: Faulty, exchange: bool = True) -> None:
        self.kind, self.new, self.faulty, self.exchange = kind, new, faulty, exchange
        self.place, self.output, self.base = root / "place", root / "place" / "out", base
        self.adapters = [root / name for name in ("one", "two", "three")]
        self._older = root / "older"
        for seed, adapter in enumerate(self.adapters):
            write_adapter(random_adapter(tiny_model("llama"), seed=10 + seed, r=4 + seed), adapter)
        self.place.mkdir()
        if not new:
            assert faulty.run(*self._export(self.adapters[:1])).code == 0
            shutil.copytree(self.output, self._older)
        self.before: Tree = tree(self.place)
        undisturbed = self.run()
        assert undisturbed.code == 0, undisturbed.err
        self.after, self.calls = tree(self.place), undisturbed.calls

    def _export(self, adapters: list[Path]) -> list[object]:
        asked: list[object] = ["export", "--model", self.base, "--output", self.output, *_WAYS[self.kind]]
        asked += ["--quantization", "nf4", "--overwrite", "--quiet"]
        return asked + [part for adapter in adapters for part in ("--adapter", adapter)]

    def command(self) -> list[object]:
        """The command line."""
        if self.kind == "convert":
            return ["adapter", "convert", self.adapters[1], "--export", self.output, "--overwrite", "--quiet"]
        return self._export(self.adapters[1:] if self.kind == "branch" else self.adapters[1:2])

    def another(self, method: str = "nf4") -> list[object]:
        """An export of yet another adapter into the same output."""
        return [*self._export(self.adapters[2:]), "--quantization", method]

    def reset(self) -> None:
        """Everything as it was before the command."""
        shutil.rmtree(self.place, ignore_errors=True)
        self.place.mkdir()
        if not self.new:
            shutil.copytree(self._older, self.output)

    def start(
        self, k: int = 0, mode: str = "once", error: int = 0, kinds: int = ANY, cwd: Path | None = None
    ) -> Running:
        """Start the command with a fault in the place of the output."""
        return self.faulty.start(*self.command(), arm=Fault(self.place, k, mode, error, kinds, self.exchange), cwd=cwd)

    def run(self, k: int = 0, mode: str = "once", error: int = 0, kinds: int = ANY) -> Ended:
        """The same, until it has ended."""
        return self.start(k, mode, error, kinds).wait()

    def count(self, kinds: int) -> int:
        """How many calls of some kinds an undisturbed command makes."""
        self.reset()
        return len(self.run(kinds=kinds).calls)

    def touches(self, call: Call) -> bool:
        """Whether a call changes the output itself, and not what stands beside it."""
        output = str(self.output)
        return any(path == output or path.startswith(output + "/") for path in (call.path, call.target))

    def state(self, leftovers: bool) -> str:
        """ "old" or "new" if the output is whole, else what it is a mixture of.

        Args:
            leftovers: Whether hidden files may lie about, and weights that the graph does not name, which the next
                command removes.
        """
        found = tree(self.place)
        if leftovers:
            found = {name: value for name, value in found.items() if not self._is_leftover(name)}
        if found == self.before:
            return "old"
        if found == self.after:
            return "new"
        differ = {name for name in self.before | self.after if self.before.get(name) != self.after.get(name)}
        old, new = (
            sorted(name for name in differ & found.keys() if found[name] == one.get(name))
            for one in (self.before, self.after)
        )
        strange = sorted(name for name in found if found[name] not in (self.before.get(name), self.after.get(name)))
        missing = sorted((self.before.keys() & self.after.keys()) - found.keys())
        return f"mixed: old {old}, new {new}, strange {strange}, missing {missing}"

    def _is_leftover(self, name: str) -> bool:
        path, graph = self.place / name, self.output / "model.onnx"
        if any(part.startswith(".") for part in Path(name).parts):
            return True
        return path.suffix == ".data" and graph.is_file() and path.name.encode() not in graph.read_bytes()

    def recovers(self) -> str:
        """Run the command undisturbed over what is there; "new", or what was wrong."""
        ended = self.run()
        return self.state(leftovers=False) if ended.code == 0 else f"exit {ended.code}: {ended.err}"


def assert_one_message_or_none(ended: Ended, *codes: int) -> None:
    """The command ended with one of these codes, and one message if that is not 0."""
    assert ended.code in codes, (ended.code, ended.err, ended.calls[-3:])
    assert ended.err.count("lora-deploy: ") == (ended.code != 0), ended.err
    assert "Traceback" not in ended.err, ended.err
    assert not ended.err or ended.err.startswith("lora-deploy: "), ended.err


def make_scenes(base: Path, faulty: Faulty, tmp_path_factory: pytest.TempPathFactory) -> SceneFactory:
    """`scene(kind, new=False, exchange=True)`: made once, as it is before its command."""
    made: dict[tuple[str, bool, bool], Scene] = {}

    def make(kind: str, new: bool = False, exchange: bool = True) -> Scene:
        key = (kind, new, exchange)
        if key not in made:
            made[key] = Scene(kind, new, base, tmp_path_factory.mktemp(f"scene-{kind}"), faulty, exchange)
        made[key].reset()
        return made[key]

    return make
