"""Row maps: what a model class does to a checkpoint, found out with indices and done again with weights."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import onnx_ir as ir
import pytest
import torch
from onnx_ir import tensor_adapters

from lora_deploy.errors import CheckpointError
from lora_deploy.export import weights
from lora_deploy.export.graph import Segment, WeightSource, _trace_sources, build_graph
from lora_deploy.export.merge import MergedParameters
from lora_deploy.export.weights import stream_weights
from lora_deploy.quantization.base import TrainingBase
from tests.conftest import TINY_FAMILIES, CheckpointFactory
from tests.export.conftest import joined

State = dict[str, torch.Tensor]
SHAPES = {"a.weight": (6, 4), "b.weight": (6, 4), "c.weight": (4, 9), "n.bias": (6,), "one": (1, 5), "s": ()}


class Fake:
    """A module class of mobius, of which only `preprocess_weights` matters."""

    def __init__(self, change: Callable[[State], State]) -> None:
        self.preprocess_weights = change


class Parameters:
    """As MergedParameters: reads a parameter, turned where (out, in) is asked of a Conv1D."""

    def __init__(self, state: State) -> None:
        self._state = state
        self.base = SimpleNamespace(shapes={name: tuple(values.shape) for name, values in state.items()})
        self.reads: list[str] = []

    def read(self, name: str, *, transposed: bool = False) -> torch.Tensor:
        self.reads.append(name)
        return self._state[name].t() if transposed else self._state[name]


def _stream(sources: dict[str, WeightSource], state: State, expected: State) -> State:
    values = [
        ir.val(name, dtype=tensor_adapters.from_torch_dtype(expected[name].dtype), shape=tuple(expected[name].shape))
        for name in sources
    ]
    model = ir.Model(ir.Graph([], [], nodes=[], initializers=values, name="g"), ir_version=10)
    return joined(model, stream_weights(model, sources, Parameters(state)))  # type: ignore[arg-type]


# What a model class may do: names of the result from the state.
PLAIN: dict[str, Callable[[State], State]] = {
    "nothing": lambda s: s,
    "renamed": lambda s: {name.upper(): values for name, values in s.items()},
    "turned": lambda s: {"x": s["c.weight"].t()},
    "turned and copied": lambda s: {"x": s["c.weight"].t().contiguous()},
    "a row turned": lambda s: {"x": s["one"].t()},
    "turned and split": lambda s: dict(zip("qkv", s["c.weight"].t().split(3), strict=True)),
    "split and turned": lambda s: {"q": s["c.weight"][:, 2:7].t()},
    "joined": lambda s: {"x": torch.cat([s["a.weight"], s["b.weight"]]), "y": torch.cat([s["n.bias"]] * 2)},
    "joined from parts": lambda s: {"x": torch.cat([s["b.weight"][3:], s["a.weight"][:2], s["b.weight"][:1]])},
    "turned and joined": lambda s: {"x": torch.cat([s["c.weight"].t()[4:], s["c.weight"].t()[:4]])},
    "rows permuted": lambda s: {"x": s["a.weight"][[5, 0, 3, 1, 2, 4]], "y": s["n.bias"][[2, 1]]},
    "rows backwards": lambda s: {"x": s["a.weight"].flip(0)},
    "rows interleaved": lambda s: {"x": s["a.weight"].view(2, 3, 4).transpose(0, 1).reshape(6, 4)},
    "a row repeated": lambda s: {"x": s["a.weight"][[1, 1, 2]]},
    "one row": lambda s: {"x": s["a.weight"][2:3]},
    "a scalar": lambda s: {"x": s["s"]},
}


@pytest.mark.parametrize("change", PLAIN)
def test_row_maps_do_to_weights_what_the_model_class_does(change: str) -> None:
    state = {name: torch.randn(shape) for name, shape in SHAPES.items()}
    expected = PLAIN[change](dict(state))
    sources = _trace_sources(Fake(PLAIN[change]), SHAPES, "config.json")
    found = _stream(sources, state, expected)
    assert found.keys() == expected.keys()
    for name, values in found.items():
        assert torch.equal(values, expected[name])
        assert values.is_contiguous()


# What is more than moving rows about: the map would be wrong, so it must be refused.
ARITHMETIC: dict[str, Callable[[State], State]] = {
    "one added (a norm of 1 + w)": lambda s: {"x": s["n.bias"] + 1},
    "doubled": lambda s: {"x": s["n.bias"] * 2},
    "doubled, two axes": lambda s: {"x": s["a.weight"] * 2},
    "negated": lambda s: {"x": -s["n.bias"]},
    "two added": lambda s: {"x": s["a.weight"] + s["b.weight"]},
    "one less the other": lambda s: {"x": s["a.weight"] - s["b.weight"]},
    "scaled": lambda s: {"x": s["a.weight"] * 0.5},
    "of floating point": lambda s: {"x": s["n.bias"].float()},
    "padded with zeros": lambda s: {"x": torch.cat([s["a.weight"], torch.zeros(2, 4, dtype=s["a.weight"].dtype)])},
    "a bias made up": lambda s: {"x": torch.zeros(6, dtype=s["n.bias"].dtype)},
    "columns backwards": lambda s: {"x": s["a.weight"].flip(1)},
    "columns left out": lambda s: {"x": s["a.weight"][:, 1:]},
    "columns left out at the end": lambda s: {"x": s["a.weight"][:, :3]},
    "joined side by side": lambda s: {"x": torch.cat([s["a.weight"], s["b.weight"]], dim=1)},
    "reshaped": lambda s: {"x": s["a.weight"].reshape(4, 6)},
    "made one axis": lambda s: {"x": s["a.weight"].reshape(-1)},
    "given a third axis": lambda s: {"x": s["a.weight"][None]},
    "the diagonal": lambda s: {"x": s["a.weight"][:4].diagonal()},
}


@pytest.mark.parametrize("change", ARITHMETIC)
def test_a_model_class_that_does_more_than_move_rows_is_refused_by_name(change: str) -> None:
    with pytest.raises(CheckpointError, match="more than renaming, splitting and transposing") as caught:
        _trace_sources(Fake(ARITHMETIC[change]), SHAPES, "config.json")
    assert caught.value.details == {"file": "config.json", "tensor": "x"}


def test_a_module_without_preprocessing_takes_the_checkpoint_as_it_is() -> None:
    sources = _trace_sources(object(), {"w": (3, 2)}, "config.json")
    assert sources == {"w": WeightSource((Segment("w", range(3)),))}


def test_a_packed_parameter_is_read_once_for_all_its_parts() -> None:
    """Reading is quantizing and merging: it must not happen three times for q, k and v."""
    state = {name: torch.randn(shape) for name, shape in SHAPES.items()}
    split = PLAIN["turned and split"]
    sources = _trace_sources(Fake(split), SHAPES, "config.json")
    values = [ir.val(name, dtype=ir.DataType.FLOAT, shape=(3, 4)) for name in sources]
    model = ir.Model(ir.Graph([], [], nodes=[], initializers=values, name="g"), ir_version=10)
    parameters = Parameters(state)
    assert len(list(stream_weights(model, sources, parameters))) == 3  # type: ignore[arg-type]
    assert parameters.reads == ["c.weight"]


def test_a_large_table_comes_some_rows_at_a_time(
    checkpoint_dir: CheckpointFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = TrainingBase(checkpoint_dir("llama"))
    graph = _graph(base)
    monkeypatch.setattr(weights, "LARGE_TABLE", 64 * 50)
    parts = list(stream_weights(graph.model, graph.sources, MergedParameters(base, None)))
    tables = [name for name, _ in parts if name == "model.embed_tokens.weight"]
    assert len(tables) == 3  # of 131 rows
    found = joined(graph.model, parts)
    assert torch.equal(found["model.embed_tokens.weight"], base.tensor("model.embed_tokens.weight"))
    assert len(found) == len(graph.sources)


def test_gpt2_is_split_into_q_k_and_v_as_slicing_does_it(checkpoint_dir: CheckpointFactory) -> None:
    base = TrainingBase(checkpoint_dir("gpt2"))
    graph = _graph(base)
    found = joined(graph.model, stream_weights(graph.model, graph.sources, MergedParameters(base, None)))
    for layer in (0, 1):
        stored = base.tensor(f"transformer.h.{layer}.attn.c_attn.weight")
        bias = base.tensor(f"transformer.h.{layer}.attn.c_attn.bias")
        assert stored.shape == (48, 144)
        for part, name in enumerate("qkv"):
            columns = slice(48 * part, 48 * part + 48)
            assert torch.equal(found[f"transformer.h.{layer}.attn.{name}_proj.weight"], stored[:, columns].t())
            assert torch.equal(found[f"transformer.h.{layer}.attn.{name}_proj.bias"], bias[columns])


def _graph(base: TrainingBase, precision: str = "fp32", **changes: Any) -> Any:
    shapes = {name: shape for name, shape in base.shapes.items() if name not in base.aliases} | changes
    return build_graph(base.config, shapes, precision=precision, provider="cpu", file="config.json")


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_weights_stream_as_mobius_own_preprocessing_gives_them(family: str, checkpoint_dir: CheckpointFactory) -> None:
    """The oracle: the module class's `preprocess_weights` on the real tensors."""
    from mobius._registry import registry

    base = TrainingBase(checkpoint_dir(family))
    graph = _graph(base)
    found = joined(graph.model, stream_weights(graph.model, graph.sources, MergedParameters(base, None)))
    state = {name: base.tensor(name) for name in base.shapes}
    module = registry.get(family).__new__(registry.get(family))
    object.__setattr__(module, "config", base.config)
    expected = module.preprocess_weights(dict(state))
    assert len(found) > 20
    for name, values in found.items():
        assert torch.equal(values, expected[name]), name


def test_a_weight_of_the_model_that_the_graph_does_not_read_is_refused(checkpoint_dir: CheckpointFactory) -> None:
    with pytest.raises(CheckpointError, match="leaves one of its weights out") as caught:
        _graph(TrainingBase(checkpoint_dir("llama")), **{"model.layers.0.extra.weight": (3, 3)})
    assert caught.value.details["tensor"] == "model.layers.0.extra.weight"


def test_a_weight_of_the_graph_that_the_model_does_not_have_is_refused(checkpoint_dir: CheckpointFactory) -> None:
    base = TrainingBase(checkpoint_dir("llama"))
    del base.shapes["model.norm.weight"]
    with pytest.raises(CheckpointError, match="needs a weight that the model does not have") as caught:
        _graph(base)
    assert caught.value.details["tensor"] == "model.norm.weight"


def test_a_kind_of_model_without_a_graph_is_refused_by_name(checkpoint_dir: CheckpointFactory) -> None:
    base = TrainingBase(checkpoint_dir("llama"))
    base.config.model_type = "nonsense"
    with pytest.raises(CheckpointError, match="no graph") as caught:
        _graph(base)
    assert caught.value.details["found"] == "nonsense"


@pytest.mark.parametrize(("precision", "dtype"), [("fp16", ir.DataType.FLOAT16), ("bf16", ir.DataType.BFLOAT16)])
def test_every_weight_has_the_type_of_the_graph(
    precision: str, dtype: ir.DataType, checkpoint_dir: CheckpointFactory
) -> None:
    graph = _graph(TrainingBase(checkpoint_dir("gpt2")), precision)
    assert {graph.model.graph.initializers[name].dtype for name in graph.sources} == {dtype}
    assert graph.model.graph.name == "gpt2"
