"""The page's program, made of `frontend/` by Vite once for each of its versions, and kept in the user's cache."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from filelock import FileLock

from lora_deploy.errors import OutputError, UsageError
from lora_deploy.places import cache_directory

__all__ = ["build_bundle"]

SOURCE = Path(__file__).with_name("frontend")
# What of the source is no source.
_MADE = ("node_modules", "dist")
_NEEDS = "Node.js 20.19, or 22.12 and later, with npm, which fetches onnxruntime-web and Vite"


def build_bundle() -> Path:
    """Have the program built, which takes a while the first time.

    Returns:
        A directory with `index.html`, to be copied.

    Raises:
        UsageError: There is no Node.js, or it could not build.
        OutputError: The cache cannot be written.
    """
    place = cache_directory() / "web" / _hash_source()
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(place.with_suffix(".lock")):
            if not place.is_dir():
                _build(place)
    except OSError as error:
        raise OutputError(
            "the page's program could not be kept",
            file=error.filename or place,
            found=error.strerror or str(error),
            remedy="set XDG_CACHE_HOME to a directory that can be written",
        ) from error
    return place


def _hash_source() -> str:
    digest = hashlib.sha256()
    for path in sorted(SOURCE.rglob("*")):
        name = path.relative_to(SOURCE)
        if path.is_file() and name.parts[0] not in _MADE:
            digest.update(f"{name.as_posix()}\0{path.stat().st_size}\0".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _build(place: Path) -> None:
    npm = shutil.which("npm")
    if npm is None:
        raise UsageError("the page is built with Node.js, which is not here", expected=_NEEDS, remedy="install it")
    with tempfile.TemporaryDirectory(dir=place.parent, prefix=".building-") as work:
        source = Path(work) / "frontend"
        shutil.copytree(SOURCE, source, ignore=shutil.ignore_patterns(*_MADE))
        for command in (["ci", "--no-audit", "--no-fund"], ["run", "build"]):
            # A developer's NODE_ENV=production would leave Vite out.
            environment = {**os.environ, "NODE_ENV": "development"} if command[0] == "ci" else None
            done = subprocess.run([npm, *command], cwd=source, env=environment, capture_output=True, text=True)
            if done.returncode:
                raise UsageError(
                    f"npm {' '.join(command)} could not build the page",
                    found="\n".join((done.stderr or done.stdout).strip().splitlines()[:12]),
                    expected=_NEEDS,
                    remedy="see what it says",
                )
        (source / "dist").replace(place)
