"""Outputs that cannot be written, and work that is broken off: nothing is left, and an older export stays as it was."""

from __future__ import annotations

import builtins
import errno
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lora_deploy.export import commit, data_file, writer
from lora_deploy.export import write as write_module
from lora_deploy.verify import deployed
from lora_deploy.verify.report import ParityReport
from tests.commands import assert_one_message, tree
from tests.faults.conftest import Place

Patch = pytest.MonkeyPatch


def test_an_export_that_exists_is_kept_unless_overwrite_is_said(place: Place) -> None:
    assert place.export().code == 0
    before = tree(place.root)
    assert_one_message(place.export(), 5, "the output exists", place.output, "an export", "--overwrite")
    assert tree(place.root) == before
    assert place.export("--overwrite", quantization="fp4").code == 0
    assert {name for name in tree(place.root) if name not in before} == {
        f"out/{file.name}" for file in place.output.glob("*.data")
    }


def test_other_files_in_the_output_are_kept_and_called_so(place: Place) -> None:
    place.output.mkdir()
    (place.output / "thesis.tex").write_text("years of work")
    before = tree(place.root)
    assert_one_message(place.export(), 5, "the output exists", "other files")
    assert tree(place.root) == before


def test_an_empty_directory_is_a_fine_output(place: Place) -> None:
    place.output.mkdir()
    assert place.export().code == 0


@pytest.mark.parametrize("flags", [[], ["--overwrite"]])
def test_an_output_that_is_a_file_is_kept(flags: list[str], place: Place) -> None:
    place.output.write_text("years of work")
    assert_one_message(place.export(*flags), 5, "the output is a file", place.output)
    assert place.output.read_text() == "years of work"


@pytest.mark.parametrize("name", ["file/out", "file/deep/out", "new/" + "x" * 300, "x" * 250])
def test_a_path_that_cannot_be_a_directory_ends_with_five_and_makes_none(name: str, place: Place) -> None:
    """Below a regular file, or longer than a name can be (with the staging directory's prefix, in the last case)."""
    (place.root / "file").write_text("")
    before = tree(place.root)
    assert_one_message(place.export("--output", place.root / name), 5, place.root)
    assert tree(place.root) == before


def test_the_parents_of_the_output_are_made_and_go_again_where_nothing_comes_of_it(
    place: Place, monkeypatch: Patch
) -> None:
    deep = place.root / "a" / "b" / "out"
    before = tree(place.root)
    with monkeypatch.context() as patch:
        patch.setattr(data_file.os, "fsync", _full)
        assert_one_message(place.export("--output", deep), 5)
    assert tree(place.root) == before
    assert place.export("--output", deep).code == 0
    assert [path.name for path in deep.parent.iterdir()] == ["out"]


def _full(*arguments: object, **options: object) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _raise_from(call: int, error: BaseException, real: Callable[..., Any]) -> Callable[..., Any]:
    """A function that does its work until it is called for the given time."""
    calls = iter(range(10**6))

    def broken(*arguments: Any, **options: Any) -> Any:
        if next(calls) >= call:
            raise error
        return real(*arguments, **options)

    return broken


def _no_space() -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class _FullFile:
    """A file on a disk that is full after some bytes."""

    def __init__(self, file: Any, room: int) -> None:
        self._file, self._room = file, room

    def write(self, data: Any) -> int:
        self._room -= len(data)
        if self._room < 0:
            _full()
        return int(self._file.write(data))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _FullFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()


def _open_full(*arguments: Any) -> _FullFile:
    return _FullFile(builtins.open(*arguments), 100_000)


def _no_change_of_places(patch: Patch) -> None:
    """As on a file system that cannot exchange directories, nor rename one: files are moved one by one."""
    patch.setattr(commit, "can_rename", lambda output: False)


def _break_move(patch: Patch, call: int, error: BaseException) -> None:
    _no_change_of_places(patch)
    patch.setattr(Path, "replace", _raise_from(call, error, Path.replace))


def _break_last_move(patch: Patch, error: BaseException) -> None:
    real = Path.replace

    def replace(self: Path, target: Path) -> Path:
        if self.name == "model.onnx":
            raise error
        return real(self, target)

    _no_change_of_places(patch)
    patch.setattr(Path, "replace", replace)


def _break_commit(patch: Patch, error: BaseException) -> None:
    def fail(*arguments: object) -> Any:
        raise error

    patch.setattr(commit, "exchange", fail)
    patch.setattr(Path, "rename", fail)


# Where the disk is full, one place after another.
FULL: dict[str, Callable[[Patch], None]] = {
    "in the weights": lambda patch: patch.setattr(data_file, "open", _open_full, raising=False),
    "when the weights are synced": lambda patch: patch.setattr(data_file.os, "fsync", _full),
    "when the rest is synced": lambda patch: patch.setattr(
        data_file.os, "fsync", _raise_from(1, _no_space(), os.fsync)
    ),
    "in the graph": lambda patch: patch.setattr(writer.ir, "save", _full),
    "in the configuration": lambda patch: patch.setattr(Path, "write_text", _full),
    "in the files that are copied": lambda patch: patch.setattr(shutil, "copyfile", _full),
    "in the report": lambda patch: patch.setattr(Path, "write_bytes", _raise_from(1, _no_space(), Path.write_bytes)),
    "in the commit": lambda patch: _break_commit(patch, _no_space()),
    "in the first move": lambda patch: _break_move(patch, 0, _no_space()),
    "in a later move": lambda patch: _break_move(patch, 3, _no_space()),
    "in the last move": lambda patch: _break_last_move(patch, _no_space()),
}


@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize("moment", FULL)
def test_a_full_disk_ends_with_five_and_leaves_nothing(
    moment: str, older: bool, place: Place, monkeypatch: Patch
) -> None:
    if older:
        assert place.export("--no-verify", quantization="fp4").code == 0
    before = tree(place.root)
    with monkeypatch.context() as patch:
        FULL[moment](patch)
        ended = place.export("--overwrite")
    assert_one_message(ended, 5, "could not be written", "No space left", place.root)
    assert tree(place.root) == before


def test_a_limit_of_the_system_ends_with_five(place: Place) -> None:
    """No monkeypatch: the kernel itself refuses to write more."""
    before = tree(place.root)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        ended = place.export()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert_one_message(ended, 5, "could not be written", "File too large", place.root)
    assert tree(place.root) == before


def _interrupted_weights(*arguments: Any) -> Iterator[tuple[str, Any]]:
    for number, weight in enumerate(STREAM(*arguments)):
        if number == 5:
            raise KeyboardInterrupt
        yield weight


STREAM = write_module.stream_weights


def _interrupt(*arguments: object, **options: object) -> Any:
    raise KeyboardInterrupt


INTERRUPTED: dict[str, Callable[[Patch], None]] = {
    "in the weights": lambda patch: patch.setattr(write_module, "stream_weights", _interrupted_weights),
    "in the check": lambda patch: patch.setattr(deployed, "load_twin", _interrupt),
    "in the report": lambda patch: patch.setattr(ParityReport, "save", _interrupt),
    "in the commit": lambda patch: _break_commit(patch, KeyboardInterrupt()),
    "between the files": lambda patch: _break_move(patch, 3, KeyboardInterrupt()),
    "before the last": lambda patch: _break_last_move(patch, KeyboardInterrupt()),
}


@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize("moment", INTERRUPTED)
def test_ctrl_c_ends_with_130_and_leaves_nothing(moment: str, older: bool, place: Place, monkeypatch: Patch) -> None:
    if older:
        assert place.export("--no-verify", quantization="fp4").code == 0
    before = tree(place.root)
    with monkeypatch.context() as patch:
        INTERRUPTED[moment](patch)
        ended = place.export("--overwrite")
    assert ended == (130, "", "lora-deploy: interrupted\n")
    assert tree(place.root) == before


def test_a_bug_of_ours_is_no_message_but_a_traceback_and_leaves_nothing(place: Place, monkeypatch: Patch) -> None:
    before = tree(place.root)
    monkeypatch.setattr(deployed, "load_twin", lambda base: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        place.export()
    assert tree(place.root) == before
