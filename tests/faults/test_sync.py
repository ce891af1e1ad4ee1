"""A power cut is no kill: what was written must be on the disk before the rename that makes it the export."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import pytest

from tests.faults.forks import Call
from tests.faults.scenes import Scene, SceneFactory

SYNCS = {"fsync", "fdatasync"}
REMOVALS = {"unlink", "unlinkat", "rmdir"}
WRITES = {"open", "creat", "write", "pwrite", "pwrite64", "writev", "sendfile", "sendfile64", "copy_file_range"}
WRITES |= {"ftruncate", "ftruncate64", "mkdir", "mkdirat", "link", "linkat", "symlink", "symlinkat"}
_ENTRIES = {"open", "creat", "mkdir", "mkdirat", "link", "linkat", "symlink", "symlinkat"}


def _below(path: str, directory: str) -> bool:
    return path == directory or path.startswith(directory + "/")


def _unsynced(calls: Iterable[Call], output: Path) -> list[str]:
    """What a rename into the output made visible before it was on the disk, and renames that were never synced.

    A directory is as dirty as a file: its entries are what it holds.
    """
    dirty: set[str] = set()
    wrong: list[str] = []
    published: set[str] = set()  # directories that got an entry of the export
    for call in calls:
        if call.name in SYNCS:
            dirty.discard(call.path)
            published.discard(call.path)
        elif call.name in REMOVALS:
            dirty.discard(call.path)
        elif call.name.startswith("rename"):
            moved = {path for path in dirty if _below(path, call.path)}
            dirty = (dirty - moved) | {call.target + path[len(call.path) :] for path in moved}
            dirty.add(os.path.dirname(call.target))
            if _below(call.target, str(output)):
                wrong += [
                    f"{os.path.basename(path)} was not synced before it was renamed to {call.target}"
                    for path in sorted(moved)
                ]
                published.add(os.path.dirname(call.target))
        elif call.name in WRITES:
            path = call.target or call.path
            dirty.add(path)
            if call.name in _ENTRIES:
                dirty.add(os.path.dirname(path))
    return wrong + [f"{path} was not synced after the renames into it" for path in sorted(published)]


def _made(kind: str, new: bool, scene: SceneFactory) -> Scene:
    made = scene(kind, new)
    assert any(call.name.startswith("rename") and made.touches(call) for call in made.calls)
    return made


@pytest.mark.parametrize(
    ("kind", "new"), [("merge", True), ("merge", False), ("branch", True), ("branch", False), ("convert", False)]
)
def test_everything_is_synced_before_the_rename_and_the_directory_after(
    kind: str, new: bool, scene: SceneFactory
) -> None:
    made = _made(kind, new, scene)
    wrong = _unsynced(made.calls, made.output)
    assert not wrong, "\n".join(wrong)


def test_what_is_not_synced_is_found() -> None:
    """The rule itself, on calls that break it."""
    out, staged = Path("/p/out"), "/p/.staging"
    write = [Call("mkdir", staged, ""), Call("open", f"{staged}/f", ""), Call("write", f"{staged}/f", "")]
    synced = [Call("fsync", f"{staged}/f", ""), Call("fsync", staged, "")]
    rename = [Call("rename", staged, str(out))]
    after = [Call("fsync", "/p", "")]
    assert _unsynced([*write, *synced, *rename, *after], out) == []
    assert len(_unsynced([*write, *rename, *after], out)) == 2
    assert len(_unsynced([*write, *synced, *rename], out)) == 1
    assert len(_unsynced([*write, *synced, write[-1], *rename, *after], out)) == 1
