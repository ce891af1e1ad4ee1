"""Every family of decoders, exported with an adapter on all linear layers, against released PEFT."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
from transformers import AutoModelForCausalLM, MambaConfig

import lora_deploy
from lora_deploy.errors import CheckpointError, UsageError
from lora_deploy.export import export_onnx, source
from lora_deploy.export.source import choose_source
from lora_deploy.export.traced_decoder import trace_decoder
from lora_deploy.models import VerifiedFamily, load_table, markdown_table, table_cells
from lora_deploy.quantization.skeleton import make_skeleton
from tests import classifiers
from tests.commands import Command, command
from tests.families import FAMILIES
from tests.measured import TOLERANCE, Measured
from tests.verified import Tiny, choose, find_table, remembered_traces
from tests.verified_encoders import ClassifierTask, TinyClassifier

__all__ = ["command"]  # a fixture

TinyFactory = Callable[..., Tiny]

VARIANTS = [(name, variant) for name, family in FAMILIES.items() for variant in family.variants]
# A trace takes some eight seconds: of the variants that need one this is run always, the others are slow.
TRACED_EARLY = {("llama", "mlp_bias")}
REFUSED = {("llama", "dynamic rope")}


@pytest.fixture(scope="module", autouse=True)
def _remembered_traces() -> Iterator[None]:
    with remembered_traces(), classifiers.remembering_traces():
        yield


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyFactory:
    """`tiny(family, variant="")`: a model and its adapter, made once."""
    made: dict[tuple[str, str], Tiny] = {}

    def make(name: str, variant: str = "") -> Tiny:
        if (name, variant) not in made:
            made[name, variant] = Tiny(tmp_path_factory.mktemp(f"{name}-{variant}".replace(" ", "-")), name, variant)
        return made[name, variant]

    return make


def _shipped(name: str) -> VerifiedFamily:
    return next(row for row in load_table() if row.model_type == FAMILIES[name].kind.model_type)


def _assert_right(measured: Measured) -> None:
    assert measured.export <= TOLERANCE
    assert measured.control > 100 * TOLERANCE  # the base alone is no answer
    assert measured.logits > 5


@pytest.mark.parametrize("method", ["none", "nf4"])
@pytest.mark.parametrize("mode", ["merge", "hot-swap"])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_computes_what_was_trained(name: str, mode: str, method: str, tiny: TinyFactory) -> None:
    measured = tiny(name).measure(mode, method)
    _assert_right(measured)
    row = _shipped(name)
    assert measured.choice.source == row.graph == ("traced" if name == "falcon" else "mobius")
    assert method in (row.merge if mode == "merge" else row.branch[mode])


@pytest.mark.parametrize("mode", ["fixed", "pooled"])
def test_a_traced_graph_takes_every_kind_of_branch(mode: str, tiny: TinyFactory) -> None:
    _assert_right(tiny("falcon").measure(mode, "nf4"))


def _marked(name: str, variant: str) -> Any:
    traced = choose(FAMILIES[name].config(variant)).source == "traced" and (name, variant) not in TRACED_EARLY
    return pytest.param(name, variant, marks=pytest.mark.slow if traced else ())


@pytest.mark.parametrize(("name", "variant"), [_marked(*one) for one in VARIANTS if one not in REFUSED])
def test_every_variant_computes_what_was_trained(name: str, variant: str, tiny: TinyFactory) -> None:
    _assert_right(tiny(name, variant).measure("merge", "none"))


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_traced_graphs_are_right_for_every_family(name: str, tiny: TinyFactory) -> None:
    measured = tiny(name).measure("hot-swap", "nf4", graph="traced")
    assert measured.choice.source == "traced"
    _assert_right(measured)


@pytest.mark.parametrize(
    ("name", "graph"),
    [pytest.param("opt", "traced", marks=pytest.mark.slow), ("gemma2", "mobius"), ("mistral", "mobius")],
)
def test_half_precision_passes_the_gate(name: str, graph: str, tiny: TinyFactory) -> None:
    """The gate of fp16 runs inside the export and would raise."""
    measured = tiny(name).measure("merge", "nf4", graph=graph, precision="fp16", verify=True)
    assert TOLERANCE < measured.export < 0.2
    assert measured.control > 1


@pytest.mark.parametrize(("name", "variant"), sorted(REFUSED))
def test_what_no_source_gets_right_is_refused_by_name(name: str, variant: str, tiny: TinyFactory) -> None:
    with pytest.raises(CheckpointError, match="change with the length of the text") as caught:
        tiny(name, variant).measure("merge", "none")
    assert caught.value.exit_code == 3
    assert caught.value.details["tensor"] == "rope_parameters"
    assert "dynamic" in caught.value.details["found"]


def test_a_model_that_remembers_in_another_way_is_refused(tmp_path: Path) -> None:
    fields = {"vocab_size": 131, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}
    AutoModelForCausalLM.from_config(MambaConfig(**fields)).save_pretrained(tmp_path / "base")
    with pytest.raises(CheckpointError, match="no graph can be built") as caught:
        export_onnx(tmp_path / "base", output=tmp_path / "out", quantization="none")
    assert "mamba" in str(caught.value.details["tensor"])
    assert not (tmp_path / "out").exists()


def test_every_field_that_mobius_is_trusted_with_is_varied() -> None:
    """Nothing is said to be carried over that no variant changes."""
    checked = {family.kind.model_type: family for family in FAMILIES.values()}
    for model_type, carried in source._CARRIED.items():
        family = checked[model_type]
        defaults = family.kind().to_dict()
        varied = set()
        for variant in ("", *family.variants):
            config = family.config(variant)
            if choose(config).source == "mobius":
                varied |= {name for name, value in config.to_dict().items() if value != defaults.get(name)}
        # Gemma's hidden_act may only say what its hidden_activation says; the pattern of windows is in its layer_types.
        unused = {"hidden_act", "use_sliding_window", "max_window_layers", "_sliding_window_pattern"}
        assert carried - varied <= (unused if "gemma" in model_type else set()), model_type


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("mlp_bias", True),
        ("hidden_act", "tanh"),
        ("rope_parameters", {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
    ],
)
def test_mobius_is_refused_where_it_is_wrong_and_auto_does_without(field: str, value: object) -> None:
    config = FAMILIES["llama"].config(**{field: value})
    assert choose(config).source == "traced"
    with pytest.raises(CheckpointError, match="mobius is not known to build the right graph") as caught:
        choose_source("mobius", config, "causal-lm", "config.json")
    assert caught.value.details["tensor"] == field


def test_a_field_that_the_class_does_not_have_counts_where_code_may_read_it() -> None:
    assert choose(FAMILIES["starcoder2"].config(head_dim=16)).source == "traced"
    assert choose(FAMILIES["starcoder2"].config(activation_function="relu")).source == "mobius"
    assert choose(FAMILIES["gemma2"].config(hidden_act="gelu_pytorch_tanh")).source == "mobius"
    assert choose(FAMILIES["gemma2"].config(hidden_act="gelu")).source == "traced"
    assert choose(FAMILIES["llama"].config(sliding_window=None, unsloth_version="2026.1")).source == "mobius"


def test_auto_traces_what_was_not_verified_and_mobius_has_no_classifiers() -> None:
    config = FAMILIES["falcon"].config()
    assert choose(config).reason == "mobius' graph of falcon was not verified"
    with pytest.raises(UsageError, match="no heads"):
        choose_source("mobius", config, "sequence-classification", "config.json")
    assert choose_source("auto", config, "sequence-classification", "config.json").source == "traced"


def test_the_command_says_which_source_it_took(tiny: TinyFactory, command: Command, tmp_path: Path) -> None:
    model = tiny("mistral")
    asked = ["export", "--merge", "--model", model.base, "--adapter", model.adapter, "--quantization", "none"]
    ended = command(*asked, "--output", tmp_path / "out")
    assert ended.code == 0
    assert "graph: mobius (its graph of mistral was verified)" in ended.out
    assert ir.load(tmp_path / "out" / "model.onnx").metadata_props["lora_deploy.graph"] == "mobius"
    ended = command(*asked, "--output", tmp_path / "other", "--graph", "torch")
    assert ended.code == 2
    assert "auto, mobius, traced" in ended.err
    assert not (tmp_path / "other").exists()


def test_the_shipped_table_names_every_variant_that_is_traced_or_refused() -> None:
    decoders = [row.model_type for row in load_table() if row.task == "causal-lm"]
    assert decoders == [family.kind.model_type for family in FAMILIES.values()]
    for name, family in FAMILIES.items():
        row = _shipped(name)
        others = [one for one in family.variants if choose(family.config(one)).source != row.graph]
        refused = [variant for kind, variant in REFUSED if kind == name]
        assert row.refused == tuple(refused)
        assert row.traced == tuple(one for one in others if one not in refused)


@pytest.mark.parametrize(("mode", "method"), [pytest.param("fixed", "int8", marks=pytest.mark.slow), ("pooled", "fp4")])
@pytest.mark.parametrize(
    "task", ["sequence-classification", pytest.param("token-classification", marks=pytest.mark.slow)]
)
def test_classifiers_hold_on_the_bases_that_their_own_tests_leave_out(
    task: ClassifierTask, mode: str, method: str, tmp_path: Path
) -> None:
    _assert_right(TinyClassifier(tmp_path, "bert", task).measure(mode, method))
    row = next(row for row in load_table() if (row.model_type, row.task) == ("bert", task))
    assert row.graph == "traced"
    assert method in row.branch[mode]


@pytest.mark.slow
def test_the_shipped_table_is_what_is_found(tmp_path: Path) -> None:
    assert find_table(tmp_path) == load_table()


def test_the_documentation_shows_the_shipped_table() -> None:
    page = (Path(__file__).parents[1] / "docs/models.md").read_text(encoding="utf-8")
    assert f"\n\n{markdown_table(load_table())}\n\n" in page


def test_the_command_prints_the_table(command: Command) -> None:
    ended = command("models", "--json")
    assert ended.code == 0
    assert ended.out.count("model_type") == len(load_table())
    shown = command("models").out
    for row in load_table():
        assert table_cells(row)[0] in shown


def test_traced_and_mobius_graphs_have_the_same_inputs_and_outputs(tiny: TinyFactory, tmp_path: Path) -> None:
    names = []
    for graph in ("mobius", "traced"):
        output = tmp_path / graph
        export_onnx(tiny("opt").base, output=output, quantization="none", graph=graph, verify=False)
        model = ir.load(output / "model.onnx").graph
        names.append([[value.name for value in values] for values in (model.inputs, model.outputs)])
    assert names[0] == names[1]
    assert names[0][0][:3] == ["input_ids", "attention_mask", "position_ids"]


@pytest.mark.slow
def test_the_same_model_is_traced_to_the_same_bytes() -> None:
    config = FAMILIES["opt"].config(num_hidden_layers=2)
    skeleton = make_skeleton(config, "causal-lm")
    shapes = {name: tuple(value.shape) for name, value in skeleton.state_dict().items() if name != "lm_head.weight"}
    texts = set()
    for _ in range(2):
        graph = trace_decoder(config, shapes, precision="fp32", file="config.json")
        texts.add(ir.to_proto(graph.model).SerializeToString(deterministic=True))
    (text,) = texts
    assert b"site-packages" not in text  # torch's exporter notes where each node comes from


def test_families_differ_in_the_source_of_the_graph_alone() -> None:
    """No other file than those that choose and mend mobius' graphs, or choose a tokenizer, knows a family by name."""
    package = Path(lora_deploy.__file__).parent
    names = {row.model_type for row in load_table()} | {"t5"}
    found = {
        file.relative_to(package).as_posix()
        for file in package.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and node.value in names
    }
    assert found == {"export/source.py", "export/corrections.py", "tokenizer/choice.py"}
