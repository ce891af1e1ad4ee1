"""An export appears whole, or not at all: staged beside the output, and put there in one step.

Everything is written into a hidden directory beside the output, synced, and renamed. Where the output is there
already, the two directories change places (`renameat2` with RENAME_EXCHANGE): at no moment is a file of the one
beside a file of the other. Where the system cannot do that, the files are moved one by one, with `model.onnx` last as
the commit point. Weights have names made of their own hash, so that even then an old graph never reads new weights,
and `verify` knows every other file by its hash.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from lora_deploy.errors import OutputError
from lora_deploy.integrity import DATA_PATTERN, MODEL_NAME, MOVING, PAGE_NAME, REPORT_NAME, SIDE_FILES, stem_of
from lora_deploy.manifest import ADAPTER_DIRECTORY, ADAPTER_SUFFIX

__all__ = [
    "can_rename",
    "commit",
    "exchange",
    "link_or_copy",
    "locked",
    "staging_directory",
    "sync",
    "sync_tree",
    "write_failure",
]

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
# The file system, the kernel or the C library has no exchange, or not between these directories.
_NO_EXCHANGE = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EXDEV, errno.EBUSY, errno.EPERM}


@contextmanager
def locked(output: Path) -> Iterator[Path]:
    """Be the only one that writes to an output, until the end of the block.

    Args:
        output: The directory, which need not be there; its parents are made.

    Yields:
        Where this writer may stage: a path beside the output, hidden, where nothing is.

    Raises:
        OutputError: Somebody else is writing there, or the place cannot be written.
    """
    output = Path(os.path.realpath(output))
    missing = [parent for parent in output.parents if not os.path.lexists(parent)]
    stem = stem_of(output)
    file = stem.with_name(f"{stem.name}.lock")
    lock = FileLock(file, timeout=0)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise OutputError(
            "another lora-deploy is writing there", file=output, remedy="wait for it, or choose another --output"
        ) from None
    except OSError as error:
        _remove_empty(missing)
        raise write_failure(output, error) from error
    except BaseException:  # Ctrl-C, perhaps between the making of the file and its locking
        _unlock(lock, file)
        _remove_empty(missing)
        raise
    try:
        staging = stem.with_name(f"{stem.name}.staging")
        shutil.rmtree(staging, ignore_errors=True)  # of a run that died
        yield staging
    finally:
        _unlock(lock, file)
        _remove_empty(missing)


def _unlock(lock: FileLock, file: Path) -> None:
    """Remove the lock file while it is held: who waits for it sees that it is gone, and makes a new one."""
    with suppress(OSError, Timeout):
        if not lock.is_locked:
            lock.acquire()
        file.unlink()
    lock.release()


@contextmanager
def staging_directory(output: Path) -> Iterator[Path]:
    """A new directory beside `output`, gone afterwards, on the same file system; nobody else writes to `output`.

    Raises:
        OutputError: It cannot be made, or somebody else is writing there.
    """
    with locked(output) as staging:
        try:
            _make(staging, output)
            yield staging
        finally:
            _remove(staging)


def _remove(staging: Path) -> None:
    try:
        shutil.rmtree(staging, ignore_errors=True)
    except KeyboardInterrupt:  # nothing is kept, whatever the moment
        shutil.rmtree(staging, ignore_errors=True)
        raise


def _make(staging: Path, output: Path) -> None:
    try:
        staging.mkdir()
    except OSError as error:
        raise write_failure(output, error) from error


def commit(staging: Path, output: Path) -> None:
    """Put the staged export into its place.

    What an older export has there goes, all other files stay. Whatever stops it, the old or the new one is whole.

    Raises:
        OutputError: It could not be done.
    """
    output = Path(os.path.realpath(output))
    try:
        sync_tree(staging)
        if not can_rename(output):
            _move_files(staging, output)
        elif output.is_dir():
            _carry_over(output, staging)
            shutil.copymode(output, staging)
            if not exchange(staging, output):
                _move_files(staging, output)
        else:
            staging.rename(output)
    except OSError as error:
        raise write_failure(output, error) from error
    with suppress(OSError):  # it is there; without this a loss of power may bring the older one back, whole
        sync(output.parent)


def can_rename(output: Path) -> bool:
    """Whether a new directory may take the place: of no mount point, and not below somebody's feet."""
    try:
        here = Path.cwd()
    except OSError:  # it was removed
        here = Path()
    return output not in (here, *here.parents) and stem_of(output).parent == output.parent


def exchange(first: Path, second: Path) -> bool:
    """Let two directories change places, in one step. False where that cannot be done here, and nothing was."""
    if sys.platform != "linux":
        return False
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:  # a C library without it
        return False
    arguments = (_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), ctypes.c_uint(_RENAME_EXCHANGE))
    if rename(*arguments) == 0:
        return True
    code = ctypes.get_errno()
    if code in _NO_EXCHANGE:
        return False
    raise OSError(code, os.strerror(code), str(second))


def _carry_over(output: Path, staging: Path) -> None:
    """Files that are no part of an export are in the new directory too: the same files, by another link."""
    adapters = output / ADAPTER_DIRECTORY
    for place in (output, adapters) if adapters.is_dir() else (output,):
        for path in place.iterdir():
            target = staging / path.relative_to(output)
            if path == adapters or is_of_export(path.relative_to(output)) or os.path.lexists(target):
                continue
            target.parent.mkdir(exist_ok=True)
            if path.is_dir() and not path.is_symlink():
                shutil.copytree(path, target, symlinks=True, copy_function=link_or_copy)
            else:
                link_or_copy(path, target)


def link_or_copy(source: str | Path, target: str | Path) -> None:
    """Have a file in another place too: by another link, or as a copy where there are none; raises OSError."""
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:  # the file system has no hard links
        shutil.copy2(source, target, follow_symlinks=False)


def is_of_export(name: Path) -> bool:
    if name.parent != Path():
        return name.name.endswith((ADAPTER_SUFFIX, f"{ADAPTER_SUFFIX}.partial"))
    return name.suffix == ".onnx" or name.match(DATA_PATTERN) or str(name) in (REPORT_NAME, PAGE_NAME, *SIDE_FILES)


def _move_files(staging: Path, output: Path) -> None:
    """Move the files one by one, `model.onnx` last. If it fails before that, the older files are put back."""
    files = sorted(path for path in staging.rglob("*") if path.is_file() and path.name != MODEL_NAME)
    if any(path.name != MODEL_NAME for place in (staging, output) for path in place.glob("*.onnx")):
        _refuse_second_graph(output)
    moved: list[tuple[Path, Path, Path | None]] = []
    directories = (output / ADAPTER_DIRECTORY, output)
    missing = [path for path in directories if not os.path.lexists(path)]
    try:
        (staging / MOVING).touch()  # `verify` knows by it of a commit that was killed
        sync(staging)
        output.mkdir(exist_ok=True)
        for number, file in enumerate(files):
            target = output / file.relative_to(staging)
            target.parent.mkdir(parents=True, exist_ok=True)
            previous = None
            if target.is_file():
                previous = staging / f"previous-{number}"
                if not target.match(DATA_PATTERN):  # its name is its content: the old one is the new one
                    shutil.copy2(target, previous)
            moved.append((file, target, previous))
            file.replace(target)
        sync_tree(output)  # all that the graph reads is on the disk before the graph is
        (staging / MODEL_NAME).replace(output / MODEL_NAME)
        with suppress(OSError):
            sync(output)
    except BaseException:
        if (staging / MODEL_NAME).exists():
            _put_back(moved)
            _remove_empty(missing)
        else:  # Ctrl-C just after the last move
            _remove_older(output, files, staging)
        raise
    _remove_older(output, files, staging)


def _remove_older(output: Path, files: list[Path], staging: Path) -> None:
    """The export is there; what is left of an older one is not read with it."""
    kept = {MODEL_NAME, *(str(file.relative_to(staging)) for file in files)}
    with suppress(OSError):
        for path in [*output.iterdir(), *(output / ADAPTER_DIRECTORY).glob("*")]:
            name = path.relative_to(output)
            if path.is_file() and is_of_export(name) and str(name) not in kept:
                path.unlink()
    _remove_empty([output / ADAPTER_DIRECTORY])


def _refuse_second_graph(output: Path) -> None:
    """An older export of several graphs, or one that several would replace, would be mixed for a moment."""
    if (output / MODEL_NAME).exists():
        raise OutputError(
            "an export of several graphs can be replaced only in one step, which this place does not allow",
            file=output,
            expected="a directory that can be renamed: no mount point, not the working directory, in one that is yours",
            remedy="remove it first, or choose another --output; nothing was changed",
        )


def _put_back(moved: list[tuple[Path, Path, Path | None]]) -> None:
    for staged, target, previous in moved:
        with suppress(OSError):
            if staged.exists():  # it was not moved yet
                continue
            if previous is None:
                target.unlink()
            elif previous.is_file():
                previous.replace(target)


def sync_tree(directory: Path) -> None:
    """Every file and directory below, and the directory itself, is on the disk."""
    for path in sorted(directory.rglob("*"), reverse=True):
        if not path.is_symlink() and (path.is_file() or path.is_dir()):
            sync(path)
    sync(directory)


def sync(path: Path) -> None:
    """Have a file or directory written to the disk."""
    if sys.platform == "win32" and path.is_dir():
        return  # there is no such thing
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove_empty(directories: list[Path]) -> None:
    """Remove directories, innermost first, until one of them holds something."""
    for directory in directories:
        try:
            directory.rmdir()
        except FileNotFoundError:
            continue
        except OSError:
            return


def write_failure(path: Path, error: OSError) -> OutputError:
    """What stopped the writing, as an error of ours."""
    return OutputError(
        "the export could not be written",
        file=error.filename or path,
        found=error.strerror or str(error),
        remedy="make room or choose another --output; nothing was changed",
    )
