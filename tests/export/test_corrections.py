"""What is put right in mobius' graphs, as the graph shows it; tests/test_families.py runs them."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import pytest

from lora_deploy.export.corrections import layer_windows
from lora_deploy.export.graph import build_graph
from lora_deploy.quantization.skeleton import find_aliases, make_skeleton
from tests.families import FAMILIES, WINDOW


def _attention(name: str, variant: str = "", **fields: Any) -> list[ir.Node]:
    config = FAMILIES[name].config(variant, **fields)
    skeleton = make_skeleton(config, "causal-lm")
    aliases = find_aliases(skeleton)
    shapes = {key: tuple(value.shape) for key, value in skeleton.state_dict().items() if key not in aliases}
    graph = build_graph(config, shapes, precision="fp32", provider="cpu", file="config.json")
    return [node for node in graph.model.graph if node.op_type == "Attention"]


def _mask_kinds(nodes: list[ir.Node]) -> list[str]:
    """What makes each layer's mask: a window is joined by And, padding alone is expanded."""
    kinds = []
    for node in nodes:
        assert node.attributes.get_int("is_causal") == 1
        mask = node.inputs[3]
        assert mask is not None
        producer = mask.producer()
        assert producer is not None
        kinds.append(producer.op_type)
    return kinds


@pytest.mark.parametrize(
    ("name", "variant", "expected"),
    [
        ("mistral", "", ["And", "And", "And"]),
        ("qwen2", "window", ["Expand", "And", "And"]),
        ("gemma2", "", ["And", "Expand", "And"]),
        ("gemma2", "other layers", ["Expand", "And", "And"]),
        ("gemma3", "", ["And", "Expand", "And"]),
    ],
)
def test_each_layer_reads_the_mask_of_its_own_window(name: str, variant: str, expected: list[str]) -> None:
    nodes = _attention(name, variant)
    assert _mask_kinds(nodes) == expected
    assert len({id(node.inputs[3]) for node in nodes}) == len(set(expected))  # one mask for each kind, made once
    windows = [WINDOW if kind == "And" else None for kind in expected]
    assert layer_windows(FAMILIES[name].config(variant)) == windows


def test_a_graph_without_windows_is_left_alone() -> None:
    assert all("masks/" not in str(node.inputs[3]) for node in _attention("llama"))


@pytest.mark.parametrize("name", ["gemma2", "gemma3"])
def test_gemma_scales_attention_as_its_configuration_says(name: str) -> None:
    for node in _attention(name, query_pre_attn_scalar=51):
        assert node.attributes.get_float("scale") == pytest.approx(51**-0.5)


def test_models_without_a_window_have_none_in_any_layer() -> None:
    assert layer_windows(FAMILIES["qwen3"].config()) == [None] * 3
    assert layer_windows(FAMILIES["phi3"].config("no window")) == [None] * 3
