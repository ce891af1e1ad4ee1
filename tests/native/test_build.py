"""Where the compiled kernels go, and what happens where they cannot be compiled."""

from __future__ import annotations

import ctypes
import shutil
import sys
from pathlib import Path

import pytest

from lora_deploy.errors import UsageError
from lora_deploy.native import build, load_kernels

# Stands for a compiler: answers --version, and copies its own version to the output.
_COMPILER = """
import sys
if "--version" not in sys.argv:
    open(sys.argv[sys.argv.index("-o") + 1], "w").write("{version}")
print("{version}")
"""


def _use(monkeypatch: pytest.MonkeyPatch, version: str, script: str = _COMPILER) -> None:
    command = [sys.executable, "-c", script.format(version=version)]
    monkeypatch.setattr(build, "_find_compiler", lambda: command)


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "lora-deploy"


def test_it_is_compiled_once(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    _use(monkeypatch, "cc 1.0")
    library = load_kernels()
    assert library.parent == cache
    assert list(cache.iterdir()) == [library]
    library.write_text("kept")
    assert load_kernels() == library
    assert library.read_text() == "kept"


def test_another_compiler_or_source_gives_another_library(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    _use(monkeypatch, "cc 1.0")
    first = load_kernels()
    _use(monkeypatch, "cc 1.1")
    second = load_kernels()
    assert first != second
    assert (first.read_text(), second.read_text()) == ("cc 1.0", "cc 1.1")
    copy = cache.parent / "source"
    shutil.copytree(Path(build.__file__).parent, copy)
    with (copy / "operators.c").open("a") as source:
        source.write("\n")
    monkeypatch.setattr(build, "__file__", str(copy / "build.py"))
    assert load_kernels() not in (first, second)


def test_a_relative_cache_home_is_ignored(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    _use(monkeypatch, "cc 1.0")
    assert load_kernels().parent == tmp_path / ".cache" / "lora-deploy"


def test_no_compiler(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="there is no C compiler") as error:
        load_kernels()
    assert "ziglang" in error.value.details["remedy"]
    assert not cache.exists()


def test_zig_where_there_is_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: object())
    assert build._find_compiler()[:4] == [sys.executable, "-m", "ziglang", "cc"]


def test_a_compiler_that_fails(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    _use(monkeypatch, "", "import sys; '--version' in sys.argv or sys.exit('operators.c:1: what is this?')")
    with pytest.raises(UsageError, match="cannot compile") as error:
        load_kernels()
    assert error.value.details["found"] == "operators.c:1: what is this?"
    assert not list(cache.iterdir())


def test_a_compiler_that_does_not_start(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setattr(build, "_find_compiler", lambda: [str(cache / "cc")])
    with pytest.raises(UsageError, match="does not run"):
        load_kernels()


def test_a_cache_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    _use(monkeypatch, "cc 1.0")
    cache.parent.write_text("a file")
    with pytest.raises(UsageError, match="cannot be written") as error:
        load_kernels()
    assert "XDG_CACHE_HOME" in error.value.details["remedy"]


def test_a_runtime_without_our_version_of_the_interface_is_refused(kernels: str) -> None:
    asked: list[int] = []
    messages: list[bytes] = []

    @ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p)
    def create_status(code: int, message: bytes) -> int:
        messages.append(message)
        return 4242

    oldest = (ctypes.c_void_p * 8)(ctypes.cast(create_status, ctypes.c_void_p))

    @ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint32)
    def get_api(version: int) -> int | None:
        asked.append(version)
        return ctypes.addressof(oldest) if version == 1 else None

    register = ctypes.CDLL(kernels).RegisterCustomOps
    register.restype = ctypes.c_void_p
    base = (ctypes.c_void_p * 2)(ctypes.cast(get_api, ctypes.c_void_p))
    assert register(None, base) == 4242
    assert asked == [17, 1]
    assert messages == [b"lora_deploy's operators need version 17 of onnxruntime's interface"]
