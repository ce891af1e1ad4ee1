"""What a checkpoint says of its codes is a stranger's word: each absurd one ends with 3, named by file and tensor."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.conftest import CheckpointFactory
from tests.faults.conftest import Place
from tests.faults.numbers import INFINITY, NAN, Q_PROJ, Tensors, assert_refused, change, take_base
from tests.faults.tally import Tally

STATE = f"{Q_PROJ}.weight.quant_state.bitsandbytes__nf4"


def _state_of(**changes: Any) -> Callable[[Tensors], None]:
    """Rewrite the JSON of a quant_state; None takes a key away."""

    def rewrite(tensors: Tensors) -> None:
        state = json.loads(bytes(tensors[STATE].tolist())) | changes
        text = json.dumps({key: value for key, value in state.items() if value is not None})
        tensors[STATE] = torch.tensor(list(text.encode()), dtype=torch.uint8)

    return rewrite


def _state_is(raw: bytes) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({STATE: torch.tensor(list(raw), dtype=torch.uint8)})


def _without(*ends: str) -> Callable[[Tensors], None]:
    def rewrite(tensors: Tensors) -> None:
        for end in ends:
            del tensors[f"{Q_PROJ}.weight.{end}"]

    return rewrite


def _resize(end: str, count: int) -> Callable[[Tensors], None]:
    def rewrite(tensors: Tensors) -> None:
        old = tensors[f"{Q_PROJ}.{end}"]
        tensors[f"{Q_PROJ}.{end}"] = torch.ones(count, dtype=old.dtype)

    return rewrite


def _retype(end: str, dtype: torch.dtype) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({f"{Q_PROJ}.{end}": tensors[f"{Q_PROJ}.{end}"].to(dtype)})


# What is done to the state of a double-quantized nf4 weight (64, 64), and what the message must hold.
STATES: dict[str, tuple[Callable[[Tensors], object], str]] = {
    "a NaN offset": (_state_of(nested_offset=NAN), "nested_offset"),
    "an infinite offset": (_state_of(nested_offset=-INFINITY), "nested_offset"),
    "an offset beyond float": (_state_is(b'{"nested_offset": 1e999}'), "quant_type"),
    "an offset that is text": (_state_of(nested_offset="0.1"), "nested_offset"),
    "no offset": (_state_of(nested_offset=None), "nested_offset"),
    "a huge block": (_state_of(blocksize=1 << 62), "blocksize"),
    "a block beyond 64 bits": (_state_of(blocksize=1 << 80), "blocksize"),
    "a negative block": (_state_of(blocksize=-64), "blocksize"),
    "a block of zero": (_state_of(blocksize=0), "blocksize"),
    "a block of three": (_state_of(blocksize=3), "blocksize"),
    "a block of another size": (_state_of(blocksize=128), "bytes"),
    "a block that is text": (_state_of(blocksize="64"), "blocksize"),
    "a block that is true": (_state_of(blocksize=True), "blocksize"),
    "a broken block": (_state_of(blocksize=64.5), "blocksize"),
    "a block that is a list": (_state_of(blocksize=[64]), "blocksize"),
    "no block": (_state_of(blocksize=None), "blocksize"),
    "a huge nested block": (_state_of(nested_blocksize=1 << 62), "nested_blocksize"),
    "a negative nested block": (_state_of(nested_blocksize=-1), "nested_blocksize"),
    "a nested block of zero": (_state_of(nested_blocksize=0), "nested_blocksize"),
    "no nested block": (_state_of(nested_blocksize=None), "nested_blocksize"),
    "nothing nested beside nested tensors": (
        _state_of(nested_blocksize=None, nested_dtype=None, nested_offset=None),
        "nested_blocksize",
    ),
    "a huge shape": (_state_of(shape=[1 << 40, 1 << 40]), "(64, 64)"),
    "a negative shape": (_state_of(shape=[-64, -64]), "(64, 64)"),
    "a turned shape of as many": (_state_of(shape=[128, 32]), "(64, 64)"),
    "a shape of text": (_state_of(shape="64"), "shape"),
    "a shape of texts": (_state_of(shape=["64", "64"]), "shape"),
    "a shape of three": (_state_of(shape=[64, 64, 1]), "shape"),
    "a shape of a million": (_state_of(shape=[1] * 1_000_000), "4096"),
    "no shape": (_state_of(shape=None), "shape"),
    "another type": (_state_of(quant_type="fp4"), "two kinds"),
    "an unknown type": (_state_of(quant_type="nf5"), "quant_type"),
    "no type": (_state_of(quant_type=None), "quant_type"),
    "an unknown dtype": (_state_of(dtype="load"), "dtype"),
    "a dtype that is a number": (_state_of(dtype=32), "dtype"),
    "an unknown key": (_state_of(order="columns"), "order"),
    "a list": (_state_is(b"[]"), "dictionary"),
    "a number": (_state_is(b"1"), "dictionary"),
    "nothing": (_state_is(b""), "quant_state"),
    "no JSON": (_state_is(b"{"), "quant_state"),
    "no UTF-8": (_state_is(b'{"\xff": 1}'), "quant_state"),
    "brackets in brackets": (_state_is(b"[" * 4096), "quant_state"),
    "a number of 4000 digits": (_state_is(b'{"blocksize": ' + b"9" * 4000 + b"}"), "quant_state"),
    "floats": (lambda t: t.update({STATE: t[STATE].float()}), "torch.uint8"),
    "a table": (lambda t: t.update({STATE: t[STATE][None].contiguous()}), "quant_state"),
    "no absmax": (_without("absmax"), f"{Q_PROJ}.weight.absmax"),
    "no table": (_without("quant_map"), f"{Q_PROJ}.weight.quant_map"),
    "nested without tensors": (_without("nested_absmax", "nested_quant_map"), f"{Q_PROJ}.weight.nested_"),
    "nested without a table": (_without("nested_quant_map"), f"{Q_PROJ}.weight.nested_quant_map"),
    "nested without scales": (_without("nested_absmax"), f"{Q_PROJ}.weight.nested_absmax"),
    "too few codes": (_resize("weight", 2047), "2048 bytes"),
    "too many codes": (_resize("weight", 4096), "2048 bytes"),
    "too few absmax": (_resize("weight.absmax", 63), "64 bytes"),
    "too many absmax": (_resize("weight.absmax", 1 << 16), "64 bytes"),
    "absmax in floats": (_retype("weight.absmax", torch.float32), "torch.uint8"),
    "two nested absmax": (_resize("weight.nested_absmax", 2), "2 values"),
    "a short nested table": (_resize("weight.nested_quant_map", 255), "255 values"),
    "a nested table of codes": (_retype("weight.nested_quant_map", torch.uint8), "torch.uint8"),
    "a table of other values": (_resize("weight.quant_map", 16), "other values"),
}  # fmt: skip


@pytest.mark.parametrize("fault", STATES)
def test_what_a_quant_state_says_is_not_believed(
    fault: str, place: Place, checkpoint_dir: CheckpointFactory, tally: Tally
) -> None:
    file = take_base(place, checkpoint_dir("llama", "nf4"))
    change(file, STATES[fault][0])
    assert_refused(place, tally, STATES[fault][1], place.base, Q_PROJ, quantization=None)


@pytest.mark.parametrize("end", ["shape", "blocksize", "nested"])
def test_a_branch_reads_the_state_with_the_same_care(
    end: str, place: Place, checkpoint_dir: CheckpointFactory, tally: Tally
) -> None:
    fault = {"shape": "a huge shape", "blocksize": "a negative block", "nested": "nested without tensors"}[end]
    file = take_base(place, checkpoint_dir("llama", "nf4"))
    change(file, STATES[fault][0])
    assert_refused(place, tally, STATES[fault][1], Q_PROJ, flags=["--branch"], quantization=None)


INT8: dict[str, tuple[Callable[[Tensors], object], str]] = {
    "too few scales": (_resize("SCB", 63), "(63,)"),
    "too many scales": (_resize("SCB", 64 * 64), "(4096,)"),
    "scales that are codes": (_retype("SCB", torch.int8), "torch.int8"),
    "codes of another shape": (lambda t: t.update({f"{Q_PROJ}.weight": t[f"{Q_PROJ}.weight"][:32]}), "(32, 64)"),
    "codes in floats": (_retype("weight", torch.float32), "torch.float32"),
    "codes in tiles": (lambda t: t.update({f"{Q_PROJ}.weight_format": torch.tensor(2, dtype=torch.uint8)}), "rows"),
}


@pytest.mark.parametrize("fault", INT8)
def test_what_belongs_to_int8_codes_must_fit_them(
    fault: str, place: Place, checkpoint_dir: CheckpointFactory, tally: Tally
) -> None:
    file = take_base(place, checkpoint_dir("llama", "int8"))
    change(file, INT8[fault][0])
    assert_refused(place, tally, INT8[fault][1], file, Q_PROJ, quantization=None)
