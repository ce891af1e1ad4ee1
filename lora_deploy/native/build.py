"""Compile our C once, into the user's cache."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from lora_deploy.errors import UsageError
from lora_deploy.places import cache_directory

__all__ = ["load_kernels", "load_weights"]

# Strict IEEE arithmetic but for fused multiply-adds: the dequantized values must be exact. No -march: the code asks
# the processor itself, and a home directory may be shared by machines that differ.
_FLAGS = ("-std=gnu11", "-shared", "-fno-math-errno")
_OPERATORS = ("-O3", "-fvisibility=hidden", "-ffp-contract=fast")
# Nothing fused where the bits must be torch's. -O3 unrolls the sums of blocks and is slower, to compile too.
_WEIGHTS = ("-O2", "-ftree-vectorize", "-ffp-contract=off", "-fno-trapping-math")
_SUFFIXES = {"win32": ".dll", "darwin": ".dylib"}
_REMEDY = "install a C compiler (gcc or clang), or: pip install ziglang"
_SECONDS = 300


def load_kernels() -> Path:
    """The library with our operators, compiled if this machine has not done it yet (some seconds).

    Give it to onnxruntime: `options.register_custom_ops_library(str(load_kernels()))`. A node is switched to it by its
    domain: `com.microsoft` MatMulBnb4 becomes `lora_deploy` MatMulBnb4. operators.c says what there is.

    Returns:
        The shared library, under `$XDG_CACHE_HOME/lora-deploy` or `~/.cache/lora-deploy`. Its name holds a hash of the
        source, the compiler and the machine, so it is never stale.

    Raises:
        UsageError: There is no C compiler, it fails, or the cache cannot be written.
    """
    return _load("operators.c", "kernels", _OPERATORS)


def load_weights() -> Path:
    """The library that rounds and dequantizes weights (`lora_deploy.native.weights`), compiled in the same way.

    Raises:
        UsageError: As `load_kernels`.
    """
    return _load("weights.c", "weights", _WEIGHTS)


def _load(main: str, name: str, own_flags: tuple[str, ...]) -> Path:
    compiler, flags = _find_compiler(), (*_FLAGS, *own_flags)
    parts = [*compiler, _run([*compiler, "--version"]), *flags, sys.platform, platform.machine()]
    digest = hashlib.sha256("\0".join(parts).encode())
    for source in _sources(main):
        digest.update(b"\0" + source.name.encode() + b"\0" + source.read_bytes())
    library = cache_directory() / f"{name}-{digest.hexdigest()[:16]}{_SUFFIXES.get(sys.platform, '.so')}"
    if not library.is_file():
        _compile([*compiler, *flags], main, library)
    _check_owner(library)
    return library


def _sources(main: str) -> list[Path]:
    """A source of ours and all headers of ours that it includes, sorted."""
    found: set[Path] = set()
    left = [Path(__file__).parent / main]
    while left:
        source = left.pop()
        if source not in found:
            found.add(source)
            text = source.read_text(encoding="utf-8")
            left += [source.parent / header for header in re.findall(r'^#include "(.+)"', text, re.MULTILINE)]
    return sorted(found)


def _check_owner(library: Path) -> None:
    """What is executed must be ours alone to write."""
    if sys.platform == "win32":
        return
    for path in (library, library.parent):
        status = path.stat()
        if status.st_uid != os.getuid() or status.st_mode & 0o022:
            raise UsageError(
                "others can write the compiled kernels",
                file=path,
                remedy="remove it, or set XDG_CACHE_HOME to a directory of your own",
            )


def _find_compiler() -> list[str]:
    for name in ("cc", "gcc", "clang"):
        if found := shutil.which(name):
            return [found]
    if importlib.util.find_spec("ziglang") is not None:
        return [sys.executable, "-m", "ziglang", "cc", "-mcpu=baseline"]  # its default is this very processor
    raise UsageError("there is no C compiler, which our operators need", remedy=_REMEDY)


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=_SECONDS, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UsageError("the C compiler does not run", found=error, remedy=_REMEDY) from error
    if done.returncode != 0:
        message = "\n".join(done.stderr.strip().splitlines()[:5]) or f"exit code {done.returncode}"
        raise UsageError(f"{command[0]} cannot compile our kernels", found=message[:1000], remedy=_REMEDY)
    return done.stdout


def _compile(command: list[str], main: str, library: Path) -> None:
    """Write the library in one step: another process may compile or load it at the same time."""
    flags = [] if sys.platform == "win32" else ["-fPIC"]
    try:
        library.parent.mkdir(parents=True, exist_ok=True, mode=0o700)  # what is in it will be executed
        with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
            built = Path(scratch) / library.name
            _run([*command, *flags, "-o", str(built), str(Path(__file__).parent / main)])
            try:
                os.replace(built, library)
            except OSError:  # Windows does not replace a library in use; one that is there by now is the same
                if not library.is_file():
                    raise
    except OSError as error:
        raise UsageError(
            "the compiled kernels cannot be written", file=library, found=error, remedy="set XDG_CACHE_HOME"
        ) from error
