"""The adapters of a session: found, uploaded when they are first used, blended."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_deploy.errors import UsageError
from lora_deploy.integrity import find_adapters
from lora_deploy.manifest import ADAPTER_SUFFIX, Manifest
from lora_deploy.run.adapter_files import Tensors, read_onnx_adapter
from lora_deploy.run.session import OnnxSession, numpy_dtype
from lora_deploy.slots import Slot

__all__ = ["Adapters", "blend_adapters"]

_KEPT = 64  # adapters that stay where the model runs


class Adapters:
    """The adapters of an open export, each read, checked and uploaded when it is first used.

    Args:
        session: The open export.
        directory: Where its adapter files are.
    """

    def __init__(self, session: OnnxSession, directory: Path) -> None:
        self._session = session
        manifest = session.manifest
        self._kind = manifest.branch if manifest is not None else None
        self._pool = list(manifest.pool) if manifest is not None else []
        self._directory = directory
        self._files = find_adapters(directory) if self._kind == "hot-swap" else {}
        self._stamps: dict[str, tuple[int, ...]] = {}
        self._read: dict[str, Tensors] = {}
        self._uploaded: dict[str, dict[str, Any]] = {}

    @property
    def names(self) -> list[str]:
        """What can be chosen from."""
        return self._pool if self._kind == "pooled" else list(self._files)

    def add(self, file: str | Path, name: str | None = None) -> str:
        """Make an adapter file that is elsewhere available, while the model runs.

        Args:
            file: The `.onnx_adapter`.
            name: To choose it by; None for the file's own.

        Returns:
            The name.

        Raises:
            AdapterError: It cannot be read or is not one for this export.
            UsageError: The graph takes no files.
        """
        if self._kind != "hot-swap":
            raise self._fixed(str(file))
        file = Path(file)
        name = name or file.name.removesuffix(ADAPTER_SUFFIX)
        self._stamps[name] = _stamp(file)
        self._read[name] = read_onnx_adapter(file, self._manifest)
        self._uploaded.pop(name, None)
        self._files[name] = file
        return name

    def refresh(self) -> None:
        """Look again at the directory: what was converted since is there, what was replaced is read again."""
        if self._kind != "hot-swap":
            return
        elsewhere = {name: file for name, file in self._files.items() if file.parent.parent != self._directory}
        self._files = {**elsewhere, **find_adapters(self._directory)}
        for name in list(self._read):
            if self._files.get(name) is None or self._stamps.get(name) != _stamp(self._files[name]):
                del self._read[name]
                self._uploaded.pop(name, None)

    def is_current(self, name: str) -> bool:
        """Whether an adapter that was read is still what its file holds."""
        return name not in self._read or self._stamps[name] == _stamp(self._files[name])

    def inputs(self, adapter: str | Mapping[str, float] | None) -> Mapping[str, Any]:
        """What a run is given for an adapter, a blend of several, or None.

        Raises:
            AdapterError: One cannot be read or is not one for this export.
            UsageError: There is no such adapter, or the graph cannot choose or blend.
        """
        if adapter is None:
            return {}
        if not isinstance(adapter, (str, Mapping)):
            raise UsageError(
                "two adapters at once need weights, by name", found=adapter, expected='a name, or {"NAME": 0.5}'
            )
        if self._kind == "pooled":
            if not isinstance(adapter, str):
                raise UsageError(
                    "a pooled graph runs one adapter a row, it cannot blend them",
                    found=", ".join(adapter),
                    remedy="export with --branch alone",
                )
            return self.row_inputs([adapter])
        if self._kind != "hot-swap":
            raise self._fixed(adapter if isinstance(adapter, str) else ", ".join(adapter))
        if isinstance(adapter, str):
            # The last that was used is the last to go.
            found = self._uploaded.pop(adapter, None)
            self._uploaded[adapter] = self._upload(self._tensors(adapter)) if found is None else found
            while len(self._uploaded) > _KEPT:
                oldest = next(iter(self._uploaded))
                del self._uploaded[oldest]
                self._read.pop(oldest, None)
            return self._uploaded[adapter]
        tensors = {name: self._tensors(name) for name in adapter}
        return self._upload(blend_adapters(tensors, adapter, self._manifest))

    def row_inputs(self, adapters: Sequence[str | None]) -> Mapping[str, Any]:
        """What a run of a pooled graph is given: the id of each row's adapter, -1 for None.

        Raises:
            UsageError: There is no such adapter, or the graph is not pooled.
        """
        if self._kind != "pooled":
            if len(set(adapters)) <= 1:
                return self.inputs(next(iter(adapters), None))
            raise UsageError(
                "only a pooled graph runs different adapters at once", remedy="export with --branch --pool"
            )
        for name in adapters:
            if name is not None and name not in self._pool:
                raise self._unknown(name)
        ids = [-1 if name is None else self._pool.index(name) for name in adapters]
        return {"adapter_ids": self._session.upload(np.array(ids, np.int64))}

    @property
    def _manifest(self) -> Manifest:
        assert self._session.manifest is not None
        return self._session.manifest

    def _tensors(self, name: str) -> Tensors:
        if name not in self._files:
            raise self._unknown(name)
        if name not in self._read:
            self._stamps[name] = _stamp(self._files[name])
            self._read[name] = read_onnx_adapter(self._files[name], self._manifest)
        return self._read[name]

    def _upload(self, tensors: Tensors) -> dict[str, Any]:
        # A bfloat16 export that is checked in float32 has inputs in float32.
        types = self._session.optional_inputs
        as_float32 = {name for name in tensors if types.get(name) == "tensor(float)"}
        return {
            name: self._session.upload(values.astype(np.float32, copy=False) if name in as_float32 else values)
            for name, values in tensors.items()
        }

    def _unknown(self, name: str) -> UsageError:
        return UsageError(
            "the export has no such adapter",
            found=name,
            expected=", ".join(self.names) or "none: it has no adapters",
            remedy="add it with lora-deploy adapter convert" if self._kind == "hot-swap" else None,
        )

    def _fixed(self, name: str) -> UsageError:
        how = "is in the weights" if self._kind is None else "is one for good" if self._kind == "fixed" else "are in it"
        return UsageError(
            "this export takes no adapters",
            found=name,
            expected=f"nothing: what it was exported with {how}",
            remedy="export with --branch to be able to choose",
        )


def _stamp(file: Path) -> tuple[int, ...]:
    """Changes when a file is replaced; empty where there is none."""
    try:
        found = file.stat()
    except OSError:
        return ()
    return found.st_ino, found.st_size, found.st_mtime_ns


def blend_adapters(adapters: Mapping[str, Tensors], weights: Mapping[str, float], manifest: Manifest) -> Tensors:
    """The weighted sum of several adapters' updates, exactly: their ranks side by side.

    w1 * B1 A1 + w2 * B2 A2 = [w1 B1, w2 B2] [A1; A2]. In int8 the weight goes into B's scales, and no code changes.

    Args:
        adapters: The adapters, by name.
        weights: The weight of each that takes part.
        manifest: The graph's.

    Raises:
        UsageError: There is no weight, or one is not finite, or too large for the type of the computation.
    """
    numbers = all(isinstance(weight, (int, float)) and np.isfinite(weight) for weight in weights.values())
    if not weights or not numbers:
        raise UsageError("a blend needs adapters with finite weights", found=dict(weights))
    tensors = {}
    for slot in manifest.slots:
        names = slot.input_names
        half = len(names) // 2
        for number, name in enumerate(names):
            # The last is B itself, or its scales.
            weighted = number == len(names) - 1
            sides = [
                _scale(adapters[adapter][name], weight) if weighted else adapters[adapter][name]
                for adapter, weight in weights.items()
            ]
            tensors[name] = np.concatenate(sides, axis=-1 if number < half else 0)
        if not _is_finite(slot, tensors, manifest.compute_dtype):
            raise UsageError(
                "the weights of the blend are too large for the type that the graph computes in",
                found=f"{dict(weights)}, in {numpy_dtype(manifest.compute_dtype)}",
            )
    return tensors


def _scale(values: NDArray[Any], weight: float) -> NDArray[Any]:
    if weight == 1:
        return values
    with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is refused by the caller
        scaled: NDArray[Any] = (values.astype(np.float32) * np.float32(weight)).astype(values.dtype)
    return scaled


def _is_finite(slot: Slot, tensors: Tensors, compute_dtype: str) -> bool:
    """Whether B is, in the type of the computation."""
    with np.errstate(over="ignore", invalid="ignore"):
        values = tensors[slot.input_names[-1]].astype(np.float32)
        if slot.int8_blocks is not None:
            values = tensors[slot.input_names[-2]] * values
        return bool(np.isfinite(values.astype(numpy_dtype(compute_dtype)).astype(np.float32)).all())
