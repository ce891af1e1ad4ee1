"""An adapter's updates as the two matrices of each slot of a graph, in floats or in int8 codes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from lora_deploy.adapter.adapter import LoraAdapter, LoraUpdate
from lora_deploy.adapter.int8 import dequantize, join_blocks, quantize_a, quantize_b
from lora_deploy.errors import AdapterError
from lora_deploy.slots import Slot

__all__ = [
    "Strip",
    "cast_branch",
    "cast_slot",
    "check_slots",
    "deployed_adapter",
    "pack_slot",
    "pack_slots",
    "pack_strips",
    "packed_rank",
    "slot_strips",
]

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
        for columns, rows in slot.places(module):
            b[start:end, columns] = scaled[:, rows]
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
        tensors: Sequence[torch.Tensor]
        if slot.int8_blocks is None:
            tensors = cast_slot(slot, pack_slot(slot, adapter), compute_dtype, [adapter])
        else:
            tensors = _quantize_slot(slot, adapter)
            _check_finite(slot, tensors, adapter, compute_dtype)
        yield from zip(slot.input_names, tensors, strict=True)


def _quantize_slot(slot: Slot, adapter: LoraAdapter) -> tuple[torch.Tensor, ...]:
    """Codes and scales of A, codes and scales of B."""
    assert slot.int8_blocks is not None
    a, b = pack_slot(slot, adapter)
    return (*quantize_a(a, slot.int8_blocks[0]), *quantize_b(b, slot.int8_blocks[1]))


def _check_finite(slot: Slot, tensors: Sequence[torch.Tensor], adapter: LoraAdapter, compute_dtype: str) -> None:
    """Make sure that what codes and scales stand for is finite in the type that the graph computes in."""
    matrices = [dequantize(codes, scales) for codes, scales in zip(tensors[::2], tensors[1::2], strict=True)]
    cast_slot(slot, matrices, compute_dtype, [adapter])


class Strip(NamedTuple):
    """The rows of a slot's B that belong to one layer, and the columns outside of which they are zero.

    Attributes:
        rank: How many rows.
        start: The first column.
        stop: One past the last.
    """

    rank: int
    start: int
    stop: int


def slot_strips(slot: Slot, adapter: LoraAdapter) -> list[Strip]:
    """What of B is not zero by construction: a strip for each layer that the adapter changes, in order."""
    strips = []
    for module in slot.modules:
        if module in adapter.updates:
            columns = [columns for columns, _ in slot.places(module)]
            strips.append(Strip(adapter.updates[module].A.shape[0], columns[0].start, columns[-1].stop))
    return strips


def pack_strips(slots: Iterable[Slot], adapter: LoraAdapter, compute_dtype: str) -> Iterator[tuple[str, torch.Tensor]]:
    """As `pack_slots` of int8 slots, but of B's codes and scales only those inside its strips, one after the other.

    Args:
        slots: The graph's, with A and B in int8.
        adapter: What goes there.
        compute_dtype: Of the graph: "fp32", "fp16" or "bf16".

    Yields:
        Name of the initializer and its values; B's are flat.

    Raises:
        AdapterError: A value is not finite in that type.
    """
    for slot in slots:
        assert slot.int8_blocks is not None
        codes_a, scales_a, codes_b, scales_b = tensors = _quantize_slot(slot, adapter)
        _check_finite(slot, tensors, adapter, compute_dtype)
        block, row = slot.int8_blocks[1], 0
        codes, scales = [], []
        for rank, start, stop in slot_strips(slot, adapter):
            rows = slice(row, row + rank)
            codes.append(codes_b.flatten(1)[rows, start:stop].flatten())
            # Rounded up, for one block may serve all the slot's outputs.
            scales.append(scales_b[rows, start // block : -(-stop // block)].flatten())
            row += rank
        yield from zip(slot.input_names, (codes_a, scales_a, torch.cat(codes), torch.cat(scales)), strict=True)


def deployed_adapter(adapter: LoraAdapter, slots: Iterable[Slot]) -> LoraAdapter:
    """The adapter that a graph runs: with A and B as they are after rounding, where the slots store them as int8.

    What is between it and the adapter itself is the error of deployment; what is between it and the graph is the error
    of the export.

    Args:
        adapter: The one that was trained.
        slots: The graph's; none for an adapter that is merged.

    Returns:
        An adapter whose int8 updates hold the float32 values of the codes, the scaling in B.
    """
    updates = dict(adapter.updates)
    rounded: set[str] = set()
    for slot in slots:
        if slot.int8_blocks is None:
            continue
        codes_a, scales_a, codes_b, scales_b = _quantize_slot(slot, adapter)
        a, b = join_blocks(dequantize(codes_a, scales_a), dequantize(codes_b, scales_b))
        end = 0
        for module in slot.modules:
            if module not in adapter.updates:
                continue
            start, end = end, end + adapter.updates[module].A.shape[0]
            if module not in rounded:  # a layer may have its outputs in several slots
                own = adapter.updates[module]
                zeros = torch.zeros(own.B.shape)
                updates[module] = LoraUpdate(a[:, start:end].t(), zeros, 1.0, own.magnitude, own.scaled_bias())
                rounded.add(module)
            for columns, rows in slot.places(module):
                updates[module].B[rows] = b[start:end, columns].t()
    return replace(adapter, updates=updates)


def cast_slot(
    slot: Slot, matrices: Sequence[torch.Tensor], compute_dtype: str, adapters: Sequence[LoraAdapter]
) -> list[torch.Tensor]:
    """A and B of a slot in the graph's type.

    Args:
        slot: The place in the graph.
        matrices: A and B, float32.
        compute_dtype: "fp32", "fp16" or "bf16".
        adapters: Those that are in them, for the message: it names the layer, which the slot may hold several of.

    Raises:
        AdapterError: A value is not finite in that type.
    """
    cast = [values.to(_DTYPES[compute_dtype]) for values in matrices]
    if all(bool(torch.isfinite(values).all()) for values in cast):
        return cast
    for adapter in adapters:
        for module in slot.modules:
            if module in adapter.updates:
                update = adapter.updates[module]
                cast_branch(update.A.float(), compute_dtype, f"{module}.lora_A.weight", adapter.source)
                scaled = update.B.float() * update.scaling
                cast_branch(scaled, compute_dtype, f"{module}.lora_B.weight", adapter.source)
    # Only what is made of codes can have been larger than A and B themselves.
    return [
        cast_branch(values, compute_dtype, name, adapters[0].source)
        for name, values in zip(slot.matrix_names, matrices, strict=True)
    ]


def cast_branch(values: torch.Tensor, compute_dtype: str, name: str, source: str) -> torch.Tensor:
    """A or B in the graph's type.

    Args:
        values: float32.
        compute_dtype: "fp32", "fp16" or "bf16".
        name: Of the tensor, for the message.
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
        AdapterError: It trains parameters whole, is a DoRA or has biases of B, or updates a layer without a slot, or of
            another shape.
    """
    whole = [name for name in adapter.parameters if name.removesuffix(".weight") not in adapter.tables]
    if whole:
        raise AdapterError(
            "the adapter trains parameters of the base whole, which a graph with slots cannot change",
            file=adapter.source,
            tensor=whole[0],
            expected="updates of linear layers only",
            remedy="export it alone, with --branch --fixed or --merge",
        )
    if adapter.tables:
        raise AdapterError(
            "the adapter changes a table of tokens, which a graph with slots has no place for",
            file=adapter.source,
            tensor=next(iter(adapter.tables)),
            found="LoRA on an embedding, or trainable_token_indices",
            expected="A and B of linear layers only",
            remedy="export it alone, with --branch --fixed or --merge",
        )
    for setting in ("use_dora", "lora_bias"):
        if getattr(adapter.config, setting):
            raise AdapterError(
                "the adapter changes more of a layer than A and B, which a graph with slots has no place for",
                file=adapter.source,
                tensor=setting,
                found=True,
                expected="A and B only",
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
