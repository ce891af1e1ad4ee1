"""Files written so that a crash at any moment leaves either the old export or the new one.

Everything is staged in a directory beside the output. The weights get a name made of their own hash, so an old
`model.onnx` never reads new weights; `model.onnx` comes last and is the single commit point.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import onnx_ir as ir
import torch

from lora_deploy.errors import OutputError
from lora_deploy.manifest import ADAPTER_DIRECTORY, ADAPTER_SUFFIX

__all__ = [
    "DATA_PATTERN",
    "INLINE_BYTES",
    "MODEL_NAME",
    "SIDE_FILES",
    "TOKENIZER_FILES",
    "check_output",
    "commit",
    "staging_directory",
    "write_data",
    "write_model",
]

MODEL_NAME = "model.onnx"
# What a tokenizer or its chat template may be made of; onnxruntime-genai and optimum read the same files.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
)
# What an export may hold beside the model; of an older export it goes where the new one does not have it.
SIDE_FILES = ("config.json", "generation_config.json", "genai_config.json", "parity.json", *TOKENIZER_FILES)
DATA_PATTERN = "model-*.onnx.data"

# Page alignment lets onnxruntime map a tensor; smaller ones stay inside model.onnx, where shapes must be.
_ALIGNMENT = 4096
INLINE_BYTES = 1024
_PIECE = 1 << 24


@contextmanager
def staging_directory(output: Path) -> Iterator[Path]:
    """A new directory beside `output`, on the same file system, that is gone afterwards.

    Raises:
        OutputError: It cannot be made.
    """
    missing = [parent for parent in output.parents if not os.path.lexists(parent)]
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        directory = Path(tempfile.mkdtemp(prefix=f".{output.name}.staging-", dir=output.parent))
    except OSError as error:
        _remove_empty(missing)
        raise _failed(output, error) from error
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)
        _remove_empty(missing)


def _remove_empty(directories: list[Path]) -> None:
    """Remove directories, innermost first, until one of them holds something."""
    for directory in directories:
        try:
            directory.rmdir()
        except FileNotFoundError:
            continue
        except OSError:
            return


def write_data(
    model: ir.Model,
    tensors: Iterable[tuple[str, torch.Tensor]],
    directory: Path,
    on_bytes: Callable[[int], None] = lambda count: None,
) -> str:
    """Write the initializers to a content-named data file and let the graph refer to it.

    Args:
        model: The graph; the initializers in `tensors` get their values here.
        tensors: Name and values of each; only one is in memory at a time.
        directory: Where the file goes.
        on_bytes: Is told how many bytes were written, again and again.

    Returns:
        The SHA-256 of the file.

    Raises:
        OutputError: It could not be written.
    """
    partial = directory / "weights.partial"
    digest = hashlib.sha256()
    places: dict[str, tuple[int, int]] = {}
    try:
        with open(partial, "wb") as file:
            for name, values in tensors:
                raw = values.reshape(-1).view(torch.uint8).numpy()
                value = model.graph.initializers[name]
                if raw.nbytes < INLINE_BYTES:
                    value.const_value = ir.Tensor(_in_ir(values), dtype=value.dtype, name=name)
                    continue
                padding = bytes(-file.tell() % _ALIGNMENT)
                file.write(padding)
                digest.update(padding)
                places[name] = (file.tell(), raw.nbytes)
                for start in range(0, raw.nbytes, _PIECE):
                    piece = raw[start : start + _PIECE].data
                    file.write(piece)
                    digest.update(piece)
                    on_bytes(piece.nbytes)
                del values, raw, piece  # or they would be in memory still while the next tensor is made
            file.flush()
            os.fsync(file.fileno())
        sha256 = digest.hexdigest()
        final = f"model-{sha256[:12]}.onnx.data"
        partial.rename(directory / final)
    except OSError as error:
        raise _failed(directory, error) from error
    for name, (offset, length) in places.items():
        value = model.graph.initializers[name]
        assert value.dtype is not None
        assert value.shape is not None
        value.const_value = ir.ExternalTensor(
            final, offset, length, value.dtype, shape=value.shape, name=name, base_dir=directory
        )
    return sha256


def _in_ir(values: torch.Tensor) -> ir.TensorProtocol:
    return ir.tensor_adapters.TorchTensor(values.clone())


def write_model(model: ir.Model, directory: Path, name: str = MODEL_NAME) -> None:
    """Write a graph, which refers to the data file.

    Raises:
        OutputError: It could not be written.
    """
    file = directory / name
    try:
        ir.save(model, file)
        _sync(file)
    except OSError as error:
        raise _failed(file, error) from error


def commit(staging: Path, output: Path) -> None:
    """Move the staged files to the output, `model.onnx` last, and remove what is left of an older export.

    Whatever stops it before `model.onnx` is there, the files of an older export are put back.

    Raises:
        OutputError: It could not be done.
    """
    files = sorted(path for path in staging.rglob("*") if path.is_file() and path.name != MODEL_NAME)
    moved: list[tuple[Path, Path | None]] = []
    directories = (output / ADAPTER_DIRECTORY, output, *output.parents)
    missing = [path for path in directories if not os.path.lexists(path)]
    try:
        output.mkdir(parents=True, exist_ok=True)
        for number, file in enumerate(files):
            target = output / file.relative_to(staging)
            target.parent.mkdir(parents=True, exist_ok=True)
            previous = None
            if target.is_file():
                previous = staging / f"previous-{number}"
                if not target.match(DATA_PATTERN):  # its name is its content: the old one is the new one
                    shutil.copy2(target, previous)
            file.replace(target)
            moved.append((target, previous))
        (staging / MODEL_NAME).replace(output / MODEL_NAME)
    except BaseException as error:
        _put_back(moved)
        _remove_empty(missing)
        if isinstance(error, OSError):
            raise _failed(output, error) from error
        raise
    kept = {output / file.relative_to(staging) for file in files}
    adapters = output / ADAPTER_DIRECTORY
    with suppress(OSError):  # the export is there; what is left of an older one is not read with it
        _sync(output)
        older = [*output.glob(DATA_PATTERN), *adapters.glob(f"*{ADAPTER_SUFFIX}")]
        for stale in [*older, *(output / name for name in SIDE_FILES)]:
            if stale not in kept and stale.is_file():
                stale.unlink()
    _remove_empty([adapters])


def _put_back(moved: list[tuple[Path, Path | None]]) -> None:
    for target, previous in moved:
        with suppress(OSError):
            if previous is None:
                target.unlink()
            elif previous.is_file():
                previous.replace(target)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _failed(path: Path, error: OSError) -> OutputError:
    return OutputError(
        "the export could not be written",
        file=error.filename or path,
        found=error.strerror or str(error),
        remedy="make room or choose another --output; nothing was changed",
    )


def check_output(output: str | Path, overwrite: bool, inputs: list[Path]) -> Path:
    """The directory to write, if it is new or may be replaced, and is none of the inputs; raises OutputError."""
    output = Path(output)
    try:
        if output.is_symlink():
            output = output.resolve()
        _check_output(output, overwrite, inputs)
    except OSError as error:
        raise OutputError("the output cannot be used", file=output, found=error.strerror or str(error)) from error
    return output


def _check_output(output: Path, overwrite: bool, inputs: list[Path]) -> None:
    if any(path.is_dir() and path.resolve() == output.resolve() for path in inputs):
        raise OutputError(
            "the output is the directory of the model or the adapter", file=output, remedy="choose another --output"
        )
    if output.exists() and not output.is_dir():
        raise OutputError("the output is a file", file=output, expected="a directory that is new or empty")
    is_export = (output / MODEL_NAME).exists()
    if output.is_dir() and any(output.iterdir()) and not (overwrite and is_export):
        there = "an export" if is_export else "other files"
        raise OutputError(
            "the output exists",
            file=output,
            found=there,
            expected="a directory that is new or empty",
            remedy="choose another --output" + (", or add --overwrite" if is_export else ""),
        )
