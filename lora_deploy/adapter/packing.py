"""An adapter's updates as the two matrices of each slot of a graph."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from lora_deploy.adapter.adapter import LoraAdapter
from lora_deploy.errors import AdapterError
from lora_deploy.manifest import Slot

__all__ = ["cast_branch", "check_slots", "pack_slot", "pack_slots", "packed_rank"]

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def packed_rank(slot: Slot, adapter: LoraAdapter) -> int:
    """The rank of an adapter's branch in a slot: of all its layers together; 0 where it changes none of them."""
    return sum(adapter.updates[module].A.shape[0] for module in slot.modules if module in adapter.updates)


def pack_slot(slot: Slot, adapter: LoraAdapter) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B of one slot: the product x @ A @ B is what the adapter adds to the slot's outputs.

    Layers that read the same input (q, k and v) share one product with A = [A_q; A_k; A_v].T; B holds their B's as
    blocks, in the order of the slot's outputs, with the scaling folded in.

    Args:
        slot: The place in the graph.
        adapter: What goes there.

    Returns:
        A, float32 (inputs, rank), and B, float32 (rank, outputs); rank 0 where the adapter changes none of the layers.
    """
    rank = packed_rank(slot, adapter)
    a, b = torch.zeros(slot.inputs, rank), torch.zeros(rank, slot.outputs)
    end = 0
    for module in slot.modules:
        if module not in adapter.updates:
            continue
        update = adapter.updates[module]
        start, end = end, end + update.A.shape[0]
        a[:, start:end] = update.A.t()
        scaled = (update.B.float() * update.scaling).t()
        column = 0
        for part in slot.parts:
            rows = part.indices()
            if part.module == module:
                b[start:end, column : column + len(rows)] = scaled[:, list(rows)]
            column += len(rows)
    return a, b


def pack_slots(slots: Iterable[Slot], adapter: LoraAdapter, compute_dtype: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Every input of an adapter, one slot at a time.

    Args:
        slots: The graph's.
        adapter: What goes there.
        compute_dtype: Of the graph: "fp32", "fp16" or "bf16".

    Yields:
        Name of the input and its values, contiguous.

    Raises:
        AdapterError: A value is not finite in that type.
    """
    for slot in slots:
        for name, values in zip(slot.input_names, pack_slot(slot, adapter), strict=True):
            yield name, cast_branch(values, compute_dtype, name, adapter.source)


def cast_branch(values: torch.Tensor, compute_dtype: str, name: str, source: str) -> torch.Tensor:
    """A or B in the graph's type.

    Args:
        values: float32.
        compute_dtype: "fp32", "fp16" or "bf16".
        name: Of the input, for the message.
        source: Of the adapter, for the message.

    Raises:
        AdapterError: A value is not finite in that type.
    """
    dtype = _DTYPES[compute_dtype]
    result = values.to(dtype)
    if not bool(torch.isfinite(result).all()):
        raise AdapterError(
            "a value of the adapter, its scaling included, is too large for the type that the graph computes in",
            file=source,
            tensor=name,
            found=f"{float(values.abs().max()):g}",
            expected=f"at most {torch.finfo(dtype).max:g}",
            remedy="export with --compute-dtype fp32",
        )
    return result


def check_slots(slots: Iterable[Slot], adapter: LoraAdapter) -> None:
    """Make sure that a graph has a place for all that an adapter changes.

    Raises:
        AdapterError: It trains parameters whole, or updates a layer without a slot, or of another shape.
    """
    if adapter.parameters:
        raise AdapterError(
            "the adapter trains parameters of the base whole, which a graph with slots cannot change",
            file=adapter.source,
            tensor=next(iter(adapter.parameters)),
            expected="updates of linear layers only",
            remedy="export it alone, with --branch --fixed or --merge",
        )
    places: dict[str, tuple[int, int]] = {}
    for slot in slots:
        for module in slot.modules:
            rows = sum(len(part.indices()) for part in slot.parts if part.module == module)
            places[module] = (places.get(module, (0, 0))[0] + rows, slot.inputs)
    for name, update in adapter.updates.items():
        if name not in places:
            raise AdapterError(
                "the adapter changes a layer that has no slot in the graph",
                file=adapter.source,
                tensor=name,
                expected=f"one of {len(places)} layers, {next(iter(places), 'none')} for one",
                remedy="export again with this adapter named",
            )
        if update.shape != places[name]:
            raise AdapterError(
                "the adapter's update has another shape than the layer in the graph",
                file=adapter.source,
                tensor=name,
                found=f"B @ A is {update.shape}",
                expected=f"{places[name]}",
                remedy="give an adapter that was trained on this base",
            )
