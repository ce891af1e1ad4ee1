"""An adapter in the slots of a graph, in int8: each layer as if it were alone, and nothing stored that is zero."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lora_deploy.adapter import LoraAdapter, LoraUpdate
from lora_deploy.adapter.int8 import choose_blocks, dequantize
from lora_deploy.adapter.packing import Strip, deployed_adapter, pack_slot, pack_slots, pack_strips, slot_strips
from lora_deploy.config import LoraConfig
from lora_deploy.errors import AdapterError
from lora_deploy.slots import Slot, SlotPart

_WIDTHS = {"q": 64, "k": 32, "v": 32}


def _slot(widths: dict[str, int] | None = None, inputs: int = 96) -> Slot:
    widths = _WIDTHS if widths is None else widths
    parts = tuple(SlotPart(module=name, rows=(0, width)) for name, width in widths.items())
    blocks = choose_blocks(inputs, widths.values())
    return Slot(name="+".join(widths), inputs=inputs, outputs=sum(widths.values()), parts=parts, int8_blocks=blocks)


def _adapter(slot: Slot, ranks: dict[str, int], sizes: dict[str, float] | None = None) -> LoraAdapter:
    generator = torch.Generator().manual_seed(0)
    updates = {}
    for name, rank in ranks.items():
        rows = sum(len(rows) for _, rows in slot.places(name))
        size = (sizes or {}).get(name, 1.0)
        a = torch.randn(rank, slot.inputs, generator=generator) * size
        updates[name] = LoraUpdate(a, torch.randn(rows, rank, generator=generator) * size, 2.5)
    return LoraAdapter(LoraConfig(r=4), updates)


def _delta_error(found: LoraAdapter, expected: LoraAdapter, name: str) -> float:
    off = found.updates[name].delta_weight() - expected.updates[name].delta_weight()
    return float(off.norm() / expected.updates[name].delta_weight().norm())


@pytest.mark.parametrize("widths", [_WIDTHS, {"q": 70, "k": 14, "v": 14}], ids=str)
def test_layers_of_very_different_size_in_one_slot_each_keep_their_precision(widths: dict[str, int]) -> None:
    slot = _slot(widths)
    adapter = _adapter(slot, {"q": 3, "k": 5, "v": 2}, {"q": 1e-4, "k": 1.0, "v": 1e3})
    deployed = deployed_adapter(adapter, [slot])
    for name in widths:
        assert 1e-4 < _delta_error(deployed, adapter, name) < 0.01
        # What else is in the slot makes no difference: the same as of a slot of its own.
        single_slot = _slot({name: widths[name]})
        single = deployed_adapter(replace(adapter, updates={name: adapter.updates[name]}), [single_slot])
        assert torch.equal(single.updates[name].A, deployed.updates[name].A)
        assert torch.equal(single.updates[name].B, deployed.updates[name].B)


def test_the_deployed_adapter_is_what_the_tensors_stand_for() -> None:
    slot = _slot()
    adapter = _adapter(slot, {"q": 3, "v": 2})
    codes_a, scales_a, codes_b, scales_b = (values for _, values in pack_slots([slot], adapter, "fp32"))
    stored = (dequantize(codes_a, scales_a).flatten(0, 1), dequantize(codes_b, scales_b).flatten(1))
    packed = pack_slot(slot, deployed_adapter(adapter, [slot]))
    for found, expected, exact in zip(packed, stored, pack_slot(slot, adapter), strict=True):
        assert torch.equal(found, expected)
        assert 0 < float((found - exact).abs().max()) < 0.05


def test_rows_in_any_order_come_back_where_they_were() -> None:
    """A layer whose rows are dealt out in the slot, between those of another, and over two slots."""
    order = tuple(int(row) for row in torch.randperm(32, generator=torch.Generator().manual_seed(3)))
    parts = (
        SlotPart(module="q", rows=order, in_order=False),
        SlotPart(module="k", rows=(0, 32)),
        SlotPart(module="q", rows=(32, 64)),
    )
    first = Slot(name="s", inputs=96, outputs=96, parts=parts, int8_blocks=(32, 32))
    rest = Slot(name="t", inputs=96, outputs=32, parts=(SlotPart(module="q", rows=(64, 96)),), int8_blocks=(32, 32))
    adapter = _adapter(first, {"q": 3, "k": 2})
    q = LoraUpdate(adapter.updates["q"].A, torch.randn(96, 3, generator=torch.Generator().manual_seed(4)), 0.5)
    adapter = replace(adapter, updates={**adapter.updates, "q": q})
    deployed = deployed_adapter(adapter, [first, rest])
    assert _delta_error(deployed, adapter, "q") < 0.01
    assert _delta_error(deployed, adapter, "k") < 0.01
    assert slot_strips(first, adapter) == [Strip(3, 0, 96), Strip(2, 32, 64)]


def test_slots_of_floats_leave_the_adapter_as_it_is() -> None:
    slot = _slot()
    adapter = _adapter(slot, {"q": 3})
    for slots in ([], [slot.model_copy(update={"int8_blocks": None})]):
        assert deployed_adapter(adapter, slots).updates == adapter.updates


@pytest.mark.parametrize("widths", [_WIDTHS, {"q": 70, "k": 14, "v": 14}], ids=str)
@pytest.mark.parametrize("ranks", [{"q": 3, "k": 5, "v": 2}, {"k": 1}, {"v": 4, "q": 1}], ids=str)
def test_strips_hold_all_that_is_not_zero_and_no_zero_block(ranks: dict[str, int], widths: dict[str, int]) -> None:
    slot = _slot(widths)
    adapter = _adapter(slot, ranks)
    whole = dict(pack_slots([slot], adapter, "fp32"))
    stored = dict(pack_strips([slot], adapter, "fp32"))
    codes_a, scales_a, codes_b, scales_b = (stored[name] for name in slot.input_names)
    assert torch.equal(codes_a, whole[slot.input_names[0]])
    assert torch.equal(scales_a, whole[slot.input_names[1]])
    assert codes_b.numel() == sum(rank * widths[name] for name, rank in ranks.items())
    assert bool((scales_b > 0).all())
    b, row = torch.zeros(sum(ranks.values()), slot.outputs), 0
    for rank, start, stop in slot_strips(slot, adapter):
        width, blocks = stop - start, -(-(stop - start) // slot.int8_blocks[1])  # type: ignore[index]
        codes, codes_b = codes_b[: rank * width], codes_b[rank * width :]
        scales, scales_b = scales_b[: rank * blocks], scales_b[rank * blocks :]
        b[row : row + rank, start:stop] = dequantize(
            codes.view(rank, blocks, -1), scales.view(rank, blocks, 1)
        ).flatten(1)
        row += rank
    assert torch.equal(b, dequantize(whole[slot.input_names[2]], whole[slot.input_names[3]]).flatten(1))
    assert codes_b.numel() == scales_b.numel() == 0


@pytest.mark.parametrize(("compute", "value"), [("fp16", 1e5), ("fp32", float("inf")), ("fp32", float("nan"))])
def test_what_is_too_large_for_the_computation_is_refused(compute: str, value: float) -> None:
    slot = _slot()
    adapter = _adapter(slot, {"q": 3, "k": 1})
    adapter.updates["k"].B[5] = value
    for pack in (pack_slots, pack_strips):
        with pytest.raises(AdapterError, match="too large") as caught:
            list(pack([slot], adapter, compute))
        assert caught.value.details["tensor"] == "k.lora_B.weight"
    if compute == "fp16":
        assert list(pack_slots([slot], adapter, "fp32"))
