"""The weight that is deployed: W' = dequantize(base as trained) + scaling * B @ A, in float32.

The base is the one the adapter was TRAINED on. For a QLoRA adapter that is the dequantized NF4 weight, not the
original one: the adapter has learnt to live with the quantization error, and without it computes something else.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from lora_deploy.adapter import LoraAdapter
from lora_deploy.adapter.tables import TokenRows, check_copy
from lora_deploy.errors import InputError
from lora_deploy.export.ties import table_change
from lora_deploy.manifest import BranchKind
from lora_deploy.quantization.base import TrainingBase
from lora_deploy.quantization.hashes import hash_tensors
from lora_deploy.quantization.scheme import QuantizationScheme
from lora_deploy.quantization.stored_codes import all_finite
from lora_deploy.task import find_task, is_classification

__all__ = ["MergedParameters", "drop_copies", "hash_adapter", "merged_adapter", "open_base"]


class MergedParameters:
    """The parameters of the base with an adapter merged in, one at a time.

    Args:
        base: The training base.
        adapter: What to merge; None for the base alone.

    Attributes:
        code_hashes: Hash of each quantized weight read so far, by layer (`lora_deploy.quantization.hashes`).
    """

    def __init__(self, base: TrainingBase, adapter: LoraAdapter | None) -> None:
        self.base = base
        self.adapter = adapter
        self.code_hashes: dict[str, str] = {}

    def read(self, parameter: str, *, transposed: bool = False, rows: range | None = None) -> torch.Tensor:
        """Read one parameter. Threads may do so at the same time.

        Args:
            parameter: Its name in the transformers model.
            transposed: Whether the checkpoint stores it as (in, out) and (out, in) is wanted.
            rows: Those that are wanted, of a parameter that `has_rows`; None for all.

        Returns:
            A weight that is quantized or updated, and a table of tokens that is changed: float32, (out, in). Anything
            else: as the checkpoint stores it, turned if `transposed`.

        Raises:
            InputError: It is missing or not finite, or the merge overflows.
        """
        if rows is not None:
            return self.base.tensor(parameter, rows)
        trained = self.adapter.parameters.get(parameter) if self.adapter else None
        module = parameter.removesuffix(".weight")
        if trained is None and parameter.endswith(".weight") and module in self.base.linears:
            return self._linear(module)
        values = trained if trained is not None else self.base.tensor(parameter)
        table = table_change(self.adapter, parameter, self.base.aliases) if self.adapter else None
        if table is not None:
            return self._finite(table.change_table(values.to(torch.float32, copy=True)), parameter)
        update = self.adapter.updates.get(module) if self.adapter and parameter.endswith(".weight") else None
        if update is not None:  # an adapted output head
            return self._finite(update.merge_into(values.to(torch.float32, copy=True)), parameter)
        return values.t() if transposed else values

    def has_rows(self, parameter: str) -> bool:
        """Whether a parameter can be read some rows at a time: it is as the checkpoint stores it.

        Args:
            parameter: Its name in the transformers model.
        """
        is_table = len(self.base.shapes[parameter]) == 2 and parameter.removesuffix(".weight") not in self.base.linears
        return is_table and not self.changes(parameter)

    def changes(self, parameter: str) -> bool:
        """Whether the adapter changes a parameter.

        Args:
            parameter: Its name in the transformers model.
        """
        if self.adapter is None:
            return False
        module = parameter.removesuffix(".weight")
        table = table_change(self.adapter, parameter, self.base.aliases)
        return table is not None or parameter in self.adapter.parameters or module in self.adapter.updates

    def _linear(self, module: str) -> torch.Tensor:
        weight = self.base.weight(module)
        if weight.scheme != "none":
            self.code_hashes[module] = hash_tensors([(module, list(weight.stored()))])
        update = self.adapter.updates.get(module) if self.adapter else None
        if update is None:
            return next(weight.stored()) if weight.scheme == "none" else weight.dequantize()
        return self._finite(update.merge_into(weight.dequantize()), f"{module}.weight")

    def _finite(self, merged: torch.Tensor, parameter: str) -> torch.Tensor:
        if all_finite(merged):
            return merged
        assert self.adapter is not None
        if all_finite(MergedParameters(self.base, None).read(parameter)):
            raise InputError(
                "base and adapter are finite, but the merge of the two overflows float32",
                file=f"{self.adapter.source}, merged into {self.base.place(parameter)['file']}",
                tensor=parameter,
                found="infinity, or no number",
                expected=f"at most {torch.finfo(torch.float32).max:g}",
                remedy="the training diverged: lower the learning rate, or take an earlier checkpoint",
            )
        return merged  # the base of a module in memory: whoever casts it says so


def open_base(model: str | Path, scheme: QuantizationScheme | None, adapters: Iterable[LoraAdapter]) -> TrainingBase:
    """The training base of some adapters, which may make a classifier of a checkpoint that has no head.

    Args:
        model: A local directory or a hub id.
        scheme: As `TrainingBase` takes it.
        adapters: Those that were trained on it.

    Raises:
        CheckpointError: As `TrainingBase`.
    """
    adapters = list(adapters)
    task = find_task(None, [adapter.config.task_type for adapter in adapters])
    trained = {name: tuple(values.shape) for adapter in adapters for name, values in adapter.parameters.items()}
    return TrainingBase(model, scheme, task=task if is_classification(task) else None, trained=trained)


def merged_adapter(branch: BranchKind | None, adapters: Mapping[str, LoraAdapter]) -> LoraAdapter | None:
    """What of the adapters is merged into the base: beside a branch, only the parameters that were trained whole.

    Args:
        branch: How adapters stand in the graph; None where they are merged.
        adapters: By name.
    """
    adapter = next(iter(adapters.values()), None)
    if branch is None or adapter is None:
        return adapter
    return replace(adapter, updates={}) if branch == "fixed" else None


def drop_copies(adapter: LoraAdapter, base: TrainingBase) -> LoraAdapter:
    """An adapter without the weights that it only copied from its base.

    PEFT saves the base's own weight beside the update of an embedding or an output head, as if it had been trained.

    Raises:
        AdapterError: The copy of an embedding is of another base.
    """
    kept = {}
    for name, values in adapter.parameters.items():
        module, _, last = name.rpartition(".")
        if last == "weight" and module in adapter.tables:
            check_copy(base.tensor(name), values, name, adapter.source)
            continue
        if last == "weight" and module in adapter.updates and not base.holds_codes(module):
            own = base.tensor(name)
            if own.shape == values.shape and torch.equal(own.float(), values.float()):
                continue
        kept[name] = values
    return replace(adapter, parameters=kept)


def hash_adapter(adapter: LoraAdapter) -> str:
    """SHA-256 over all that an adapter changes: its updates, their scaling, and what was trained whole."""

    def named() -> Iterator[tuple[str, list[torch.Tensor]]]:
        for name in sorted(adapter.updates):  # by name: a lazy adapter reads each update when it is asked for
            update = adapter.updates[name]
            more = [values for values in (update.magnitude, update.bias) if values is not None]
            yield name, [update.A, update.B, torch.tensor(update.scaling, dtype=torch.float64), *more]
        for name, values in sorted(adapter.parameters.items()):
            yield name, [values]
        for name, change in sorted(adapter.tables.items()):
            settings = change.indices if isinstance(change, TokenRows) else (change.scaling,)
            yield name, [torch.tensor(settings, dtype=torch.float64), *change.tensors().values()]

    return hash_tensors(named())
