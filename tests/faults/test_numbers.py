"""Numbers that are not finite, or do not fit, in every place that holds some: exit 3, named by file and tensor."""

from __future__ import annotations

from typing import Any

import pytest
from safetensors.torch import load_file

from tests.conftest import CheckpointFactory
from tests.faults.conftest import Place
from tests.faults.numbers import (
    ADAPTER,
    DOWN,
    FIXED,
    INFINITY,
    MERGE,
    MODEL,
    NAN,
    Q_PROJ,
    Tensors,
    assert_refused,
    change,
    put,
    take_adapter,
    take_base,
)
from tests.faults.tally import Tally


@pytest.mark.parametrize("value", [NAN, INFINITY])
@pytest.mark.parametrize("flags", [MERGE, FIXED], ids=["merge", "branch"])
@pytest.mark.parametrize("end", ["absmax", "quant_map"])
def test_scales_and_table_of_four_bits(
    end: str, flags: list[object], value: float, place: Place, checkpoint_dir: CheckpointFactory, tally: Tally
) -> None:
    file = take_base(place, checkpoint_dir("llama", "nf4", double_quant=False))
    put(file, f"{Q_PROJ}.weight.{end}", value)
    assert_refused(place, tally, "not finite", file, f"{Q_PROJ}.weight.{end}", flags=flags, quantization=None)


@pytest.mark.parametrize("value", [NAN, -INFINITY])
@pytest.mark.parametrize("flags", [MERGE, FIXED], ids=["merge", "branch"])
@pytest.mark.parametrize("end", ["nested_absmax", "nested_quant_map", "quant_map"])
def test_scales_and_tables_of_double_quantization(
    end: str, flags: list[object], value: float, place: Place, checkpoint_dir: CheckpointFactory, tally: Tally
) -> None:
    file = take_base(place, checkpoint_dir("llama", "nf4"))
    put(file, f"{Q_PROJ}.weight.{end}", value)
    assert_refused(place, tally, "not finite", file, f"{Q_PROJ}.weight.{end}", flags=flags, quantization=None)


def test_scales_whose_product_overflows(place: Place, checkpoint_dir: CheckpointFactory, tally: Tally) -> None:
    file = take_base(place, checkpoint_dir("llama", "nf4"))

    def enlarge(tensors: Tensors) -> None:
        for end in ("nested_absmax", "nested_quant_map"):
            tensors[f"{Q_PROJ}.weight.{end}"].fill_(1e30)

    change(file, enlarge)
    assert_refused(place, tally, "not finite", file, f"{Q_PROJ}.weight.nested_absmax", quantization=None)


@pytest.mark.parametrize("value", [NAN, INFINITY])
@pytest.mark.parametrize("flags", [MERGE, FIXED], ids=["merge", "branch"])
def test_scales_of_int8(
    flags: list[object], value: float, place: Place, checkpoint_dir: CheckpointFactory, tally: Tally
) -> None:
    file = take_base(place, checkpoint_dir("llama", "int8"))
    put(file, f"{Q_PROJ}.SCB", value)
    assert_refused(place, tally, "not finite", file, f"{Q_PROJ}.SCB", flags=flags, quantization=None)


@pytest.mark.parametrize("method", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("value", [NAN, INFINITY])
def test_a_dense_base_beside_a_branch_is_named_as_in_its_file(
    method: str, value: float, place: Place, tally: Tally
) -> None:
    put(place.base / MODEL, f"{Q_PROJ}.weight", value)
    named = ("not finite", place.base / MODEL, f"{Q_PROJ}.weight")
    assert_refused(place, tally, *named, flags=["--branch"], quantization=method)


# What an adapter may hold beside A and B of linear layers, how it is asked for, and the end of the tensor's name.
HELD: dict[str, tuple[dict[str, Any], str]] = {
    "DoRA's magnitude": ({"use_dora": True}, f"{Q_PROJ}.lora_magnitude_vector"),
    "a bias of B": ({"lora_bias": True}, f"{Q_PROJ}.lora_B.bias"),
    "a trained head": ({"modules_to_save": ["lm_head"]}, "lm_head.weight"),
    "a trained norm": ({"modules_to_save": ["norm"]}, "model.norm.weight"),
    "trained rows": ({"trainable_token_indices": [3, 5]}, "embed_tokens.token_adapter.trainable_tokens_delta"),
    "A of an embedding": ({"target_modules": ["q_proj", "embed_tokens"]}, "embed_tokens.lora_embedding_A"),
    "B of an embedding": ({"target_modules": ["q_proj", "embed_tokens"]}, "embed_tokens.lora_embedding_B"),
}


@pytest.mark.parametrize("value", [NAN, INFINITY])
@pytest.mark.parametrize("held", HELD)
def test_everything_that_an_adapter_holds_must_be_finite(held: str, value: float, place: Place, tally: Tally) -> None:
    asked, end = HELD[held]
    file = take_adapter(place, **asked)
    key = next(name for name in load_file(file) if name.endswith(end))
    put(file, key, value)
    assert_refused(place, tally, "not finite", file, key)


def _push(place: Place, base: float, delta: float, module: str = DOWN) -> None:
    """Base and update of a layer are each so large in one place, where they meet."""

    def push_base(tensors: Tensors) -> None:
        tensors[f"{module}.weight"][0, 0] = base

    def push_adapter(tensors: Tensors) -> None:
        a, b = (tensors[f"base_model.model.{module}.lora_{side}.weight"] for side in "AB")
        a[:, 0], b[0] = 0, 0
        a[0, 0], b[0, 0] = 1, delta / 2.5  # alpha / r of the adapter

    change(place.base / MODEL, push_base)
    change(place.adapter / ADAPTER, push_adapter)


@pytest.mark.parametrize("module", [DOWN, Q_PROJ])
@pytest.mark.parametrize("method", ["none", "nf4"])
def test_a_merge_that_overflows_float16(method: str, module: str, place: Place, tally: Tally) -> None:
    """q_proj is a part of the graph's packed q, k and v: its own name is what the user knows."""
    _push(place, 60000, 60000, module)
    named = ("merge of the two overflows", place.adapter, place.base / MODEL, f"{module}.weight\n", "120000", "65504")
    flags: list[object] = ["--merge", "--precision", "fp16", "--no-verify"]
    assert_refused(place, tally, *named, "--precision fp32 or bf16", flags=flags, quantization=method)


def test_what_fits_alone_and_merged_is_no_fault(place: Place) -> None:
    """The control of the test above: half as much of each."""
    _push(place, 30000, 30000)
    assert place.export("--precision", "fp16", "--no-verify", quantization="none").code == 0


def test_a_merge_that_overflows_float32(place: Place, tally: Tally) -> None:
    _push(place, 3e38, 3e38)
    named = ("merge of the two overflows float32", place.adapter, f"{DOWN}.weight\n", "3.40282e+38")
    for precision in ("fp32", "int8", "int4"):
        flags: list[object] = ["--merge", "--precision", precision, "--no-verify"]
        assert_refused(place, tally, *named, flags=flags, quantization="none")


@pytest.mark.parametrize("side", ["A", "B"])
@pytest.mark.parametrize("module", [DOWN, Q_PROJ])
@pytest.mark.parametrize("kind", [["--fixed"], [], ["--pool"]], ids=["fixed", "hot-swap", "pooled"])
def test_a_branch_that_overflows_float16(
    kind: list[object], module: str, side: str, place: Place, tally: Tally
) -> None:
    """B is stored times the scaling, 2.5."""
    value = {"A": 70000.0, "B": 30000.0}[side]
    put(place.adapter / ADAPTER, f"base_model.model.{module}.lora_{side}.weight", value)
    flags: list[object] = ["--branch", *kind, "--compute-dtype", "fp16", "--no-verify"]
    named = (
        "too large",
        place.adapter,
        f"{module}.lora_{side}.weight\n",
        f"{value * {'A': 1, 'B': 2.5}[side]:g}",
        "65504",
    )
    assert_refused(place, tally, *named, flags=flags)


def test_a_bias_of_b_that_overflows_float16(place: Place, tally: Tally) -> None:
    file = take_adapter(place, lora_bias=True)
    put(file, f"base_model.model.{DOWN}.lora_B.bias", 30000)
    named = ("too large", place.adapter, f"{DOWN}.lora_B.bias\n", "75000", "65504")
    assert_refused(place, tally, *named, flags=[*FIXED, "--compute-dtype", "fp16", "--no-verify"])


@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize("calibration", [[], ["--calibration-rows", 0]], ids=["calibrated", "plain"])
def test_scales_of_codes_that_overflow_float16(
    precision: str, calibration: list[object], place: Place, tally: Tally
) -> None:
    _push(place, 6e7, 6e7)
    flags: list[object] = ["--merge", "--precision", precision, "--compute-dtype", "fp16", "--no-verify", *calibration]
    named = ("too large for the scales", place.base / MODEL, f"{DOWN}.weight\n", "--compute-dtype fp32")
    assert_refused(place, tally, *named, flags=flags, quantization="none")


def test_scales_of_a_base_that_overflow_float16(place: Place, tally: Tally) -> None:
    put(place.base / MODEL, f"{DOWN}.weight", 1e6)
    flags: list[object] = ["--branch", "--compute-dtype", "fp16", "--no-verify"]
    assert_refused(place, tally, "does not fit", place.base / MODEL, f"{DOWN}.weight\n", "1e+06", "65504", flags=flags)
