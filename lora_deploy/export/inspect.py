"""What an adapter changes, in numbers: of a PEFT directory, or of an `.onnx_adapter`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from pydantic import BaseModel

from lora_deploy.adapter import TrainingRecord, read_adapter
from lora_deploy.adapter.files import WEIGHTS_NAME
from lora_deploy.adapter.int8 import dequantize
from lora_deploy.errors import AdapterError
from lora_deploy.manifest import ADAPTER_SUFFIX
from lora_deploy.run.adapter_files import Tensors, read_tensors

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["AdapterDescription", "UpdateDescription", "describe_adapter"]


class UpdateDescription(BaseModel):
    """One update.

    Attributes:
        name: Of the layer, or of the slot.
        rank: Its rank; of a slot, that of all its layers together.
        inputs: Width of what it reads.
        outputs: Width of what it adds to.
        scaling: The factor on B @ A; in a slot it is in B.
        norm_A: Frobenius norm of A.
        norm_B: Frobenius norm of B.
        norm_delta: Frobenius norm of scaling * B @ A.
    """

    name: str
    rank: int
    inputs: int
    outputs: int
    scaling: float
    norm_A: float
    norm_B: float
    norm_delta: float


class AdapterDescription(BaseModel):
    """An adapter.

    Attributes:
        file: Where it is.
        bytes: Size of its weights.
        base: The base that it was trained on, as far as it is known.
        parameters: How many numbers its updates are.
        updates: Each of them.
        whole: Parameters that it trains whole.
        model_version: Of an `.onnx_adapter`: which export it is for.
    """

    file: str
    bytes: int
    base: str
    parameters: int
    updates: list[UpdateDescription]
    whole: list[str] = []
    model_version: int | None = None

    def table(self) -> Table:
        """A row for each kind of layer: in how many places, and in what range rank and norm are."""
        from rich import box
        from rich.table import Table

        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for heading in ("target", "layers", "rank", "scaling", "in", "out", "norm of update"):
            justify: Literal["left", "right"] = "left" if heading == "target" else "right"
            table.add_column(heading, justify=justify, no_wrap=True)
        kinds: dict[str, list[UpdateDescription]] = {}
        for update in self.updates:
            kinds.setdefault(update.name.rpartition(".")[2], []).append(update)
        for kind, updates in kinds.items():
            cells = [_range([getattr(update, field) for update in updates]) for field in _FIELDS]
            table.add_row(kind, str(len(updates)), *cells)
        return table

    def summary(self) -> str:
        """The rest, in a line."""
        parts = [f"{self.parameters:,} parameters in {len(self.updates)} updates, {self.bytes / 1e6:,.1f} MB"]
        if self.whole:
            parts.append(f"{len(self.whole)} parameters trained whole, {self.whole[0]} for one")
        return "; ".join([*parts, f"base: {self.base}"])


_FIELDS = ("rank", "scaling", "inputs", "outputs", "norm_delta")


def _range(values: list[float]) -> str:
    low, high = (f"{value:.4g}" for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def describe_adapter(path: str | Path) -> AdapterDescription:
    """Describe an adapter.

    Args:
        path: A directory in PEFT's format, or an `.onnx_adapter`.

    Raises:
        InputError: It is missing, damaged, or neither.
    """
    path = Path(path)
    if path.is_dir() or path.suffix != ADAPTER_SUFFIX:
        return _describe_directory(path)
    version, arrays = read_tensors(path)
    tensors = _as_floats(path, arrays)
    updates = []
    for site in sorted({name.removesuffix("/lora_A") for name in tensors if name.endswith("/lora_A")}):
        a, b = tensors[f"{site}/lora_A"], tensors.get(f"{site}/lora_B")
        if b is None or a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[0]:
            raise AdapterError(
                "an update of the adapter is not whole",
                file=path,
                tensor=site,
                found=f"A {tuple(a.shape)}, B {tuple(b.shape) if b is not None else 'missing'}",
                expected="A (in, r), B (r, out)",
            )
        if a.numel():
            updates.append(_describe(site.replace("/", "."), a.t(), b.t(), 1.0))
    return AdapterDescription(
        file=str(path),
        bytes=path.stat().st_size,
        base=f"that of the exports with model version {version}",
        parameters=sum(values.numel() for values in tensors.values()),
        updates=updates,
        model_version=version,
    )


def _as_floats(path: Path, arrays: Tensors) -> dict[str, torch.Tensor]:
    """A and B by name in float32; int8 codes times their scales, as matrices."""
    with np.errstate(over="ignore", invalid="ignore"):  # a float64 beyond float32 is shown as infinity
        tensors = {name: torch.from_numpy(values.astype("float32")) for name, values in arrays.items()}
    for name in [name.removesuffix("_codes") for name in tensors if name.endswith("_codes")]:
        codes, scales = tensors.pop(f"{name}_codes"), tensors.pop(f"{name}_scales", None)
        along = 1 if name.endswith("A") else 2
        if (
            scales is None
            or codes.ndim != 3
            or scales.shape != tuple(1 if dim == along else size for dim, size in enumerate(codes.shape))
        ):
            raise AdapterError(
                "an update of the adapter is not whole",
                file=path,
                tensor=name,
                found=f"codes {tuple(codes.shape)}, scales {tuple(scales.shape) if scales is not None else 'missing'}",
                expected="A (blocks, block, r) with scales (blocks, 1, r), B (r, blocks, block) with (r, blocks, 1)",
            )
        tensors[name] = dequantize(codes, scales).flatten(along - 1, along)
    return tensors


def _describe_directory(path: Path) -> AdapterDescription:
    adapter = read_adapter(path)
    record = TrainingRecord.load(path)
    changes = [*adapter.updates.values(), *adapter.tables.values()]
    base = f"{record.base_model} in {record.quantization}" if record else adapter.config.base_model_name_or_path
    return AdapterDescription(
        file=str(path),
        bytes=(path / WEIGHTS_NAME).stat().st_size,
        base=base or "not recorded",
        parameters=sum(values.numel() for change in changes for values in change.tensors().values()),
        updates=[_describe(name, update.A, update.B, update.scaling) for name, update in adapter.updates.items()],
        whole=sorted({*adapter.parameters, *(f"{name}.weight" for name in adapter.tables)}),
    )


def _describe(name: str, a: torch.Tensor, b: torch.Tensor, scaling: float) -> UpdateDescription:
    """Of A (r, in) and B (out, r). The update's norm comes from two r x r products: |BA|^2 = tr(B'B AA')."""
    a, b = a.double(), b.double()
    if a.shape[0] ** 2 > a.shape[1] * b.shape[0]:  # a rank beyond all sense would fill the memory
        square = float((b @ a).square().sum())
    else:
        square = float(((b.t() @ b) * (a @ a.t())).sum().clamp(min=0))
    return UpdateDescription(
        name=name,
        rank=a.shape[0],
        inputs=a.shape[1],
        outputs=b.shape[0],
        scaling=scaling,
        norm_A=float(a.norm()),
        norm_B=float(b.norm()),
        norm_delta=abs(scaling) * square**0.5,
    )
