"""Numbers at the edges: ranks, scales, shapes, blocks and lengths that are just possible, or just not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch
from safetensors.torch import load_file

from lora_deploy.adapter import LoraAdapter, write_adapter
from lora_deploy.errors import InputError, ParityError
from lora_deploy.export import export_onnx
from lora_deploy.export.writer import write_data, write_model
from tests.conftest import QUANTIZED, random_adapter, save_tiny, tiny_model
from tests.export.conftest import ODD
from tests.export.edges import Change, assert_proven, export_edge

MODES: list[dict[str, Any]] = [{"merge": True}, {"merge": False}, {"merge": False, "branch": "fixed"}]


def _times(factor: float) -> Change:
    """B times a factor, on the way to the file."""

    def change(adapter: LoraAdapter) -> LoraAdapter:
        updates = {name: replace(update, B=update.B * factor) for name, update in adapter.updates.items()}
        return replace(adapter, updates=updates)

    return change


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("rank", [1, 150])  # the layers are at most 112 wide
def test_a_rank_of_one_and_one_beyond_the_layers_own(rank: int, mode: dict[str, Any], tmp_path: Path) -> None:
    assert_proven(export_edge(tmp_path, mode=mode, r=rank, scale=0.2 if rank == 1 else 0.05))


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("method", QUANTIZED)
def test_blocks_of_zeros_in_odd_shapes(method: str, mode: dict[str, Any], tmp_path: Path) -> None:
    """An absmax of 0, to divide by, in blocks that cross rows and end in the middle of a byte."""

    def damage(tensors: dict[str, torch.Tensor]) -> None:
        for name, values in tensors.items():
            if name.endswith("_proj.weight"):
                values[3:9] = 0

    assert_proven(export_edge(tmp_path, method, ODD["llama"], mode=mode, damage=damage))


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("alpha", [1e6, 1e-6])
def test_scales_that_b_makes_up_for(alpha: float, mode: dict[str, Any], tmp_path: Path) -> None:
    assert_proven(export_edge(tmp_path, mode=mode, lora_alpha=alpha, change=_times(10 / alpha)))


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("factor", [0.0, 1e-30], ids=["B of zeros", "B of 1e-30"])
def test_an_adapter_that_changes_nothing_does_not_pass_the_gate(
    factor: float, mode: dict[str, Any], tmp_path: Path
) -> None:
    """The control could not tell the export from the bare base; nothing is written."""
    with pytest.raises(ParityError) as caught:
        export_edge(tmp_path, mode=mode, change=_times(factor))
    assert caught.value.exit_code == 4
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_a_bfloat16_adapter_on_a_float32_base(mode: dict[str, Any], tmp_path: Path) -> None:
    def change(adapter: LoraAdapter) -> LoraAdapter:
        updates = {
            name: replace(update, A=update.A.bfloat16(), B=update.B.bfloat16())
            for name, update in adapter.updates.items()
        }
        return replace(adapter, updates=updates)

    result = export_edge(tmp_path, mode=mode, change=change)
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {values.dtype for values in stored.values()} == {torch.bfloat16}
    assert_proven(result)


def test_a_vocabulary_that_was_resized_after_training_is_named(tmp_path: Path) -> None:
    """The adapter holds a head of the old size."""
    write_adapter(random_adapter(tiny_model("llama"), modules_to_save=["lm_head"]), tmp_path / "adapter")
    base = save_tiny("llama", "none", tmp_path / "base", vocab_size=140)
    with pytest.raises(InputError) as caught:
        export_onnx(base, tmp_path / "adapter", output=tmp_path / "out", quantization="nf4")
    assert caught.value.exit_code == 3
    assert "lm_head" in caught.value.details["tensor"]
    assert "131" in caught.value.details["found"]
    assert "140" in caught.value.details["expected"]
    assert caught.value.details["remedy"]
    assert not (tmp_path / "out").exists()


def test_weights_beyond_what_protobuf_holds_stay_out_of_the_graph(tmp_path: Path) -> None:
    """Whatever they are in all: a tensor of a kilobyte is in the file of weights, and the graph holds where."""
    x = ir.val("x", dtype=ir.DataType.FLOAT, shape=ir.Shape([1]))
    values = {f"w{number}": torch.full((1024,), float(number)) for number in range(300)}
    initializers = [ir.val(name, dtype=ir.DataType.FLOAT, shape=ir.Shape([1024])) for name in values]
    nodes = [ir.node("Add", [x, value]) for value in initializers]
    graph = ir.Graph([x], [nodes[-1].outputs[0]], nodes=nodes, initializers=initializers, opset_imports={"": 21})
    model = ir.Model(graph, ir_version=10)
    write_data(model, iter(values.items()), tmp_path)
    write_model(model, tmp_path)
    assert (tmp_path / "model.onnx").stat().st_size < 300 * 300
    assert next(tmp_path.glob("*.data")).stat().st_size >= 300 * 4096
