"""Classifiers: the traced graph, lowered as any other, computes what released PEFT computes with the adapter live."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
)

from lora_deploy.adapter import LoraUpdate
from lora_deploy.errors import AdapterError, CheckpointError, ParityError
from lora_deploy.export import ExportResult, export_onnx, prepare
from lora_deploy.export.traced import trace_graph
from lora_deploy.quantization import QuantizationScheme
from lora_deploy.quantization.base import TrainingBase
from lora_deploy.quantization.model import keep_codes
from lora_deploy.run import OnnxSession
from lora_deploy.run.adapters import Adapters
from lora_deploy.verify import verify
from tests.classifiers import (
    FAMILIES,
    LABELS,
    QUERY_VALUE,
    ClassifierFactory,
    classifier_dir,
    padded_batches,
    peft_adapter,
    peft_logits,
    remembered_traces,
    save_classifier,
    train_with_peft,
)
from tests.commands import tree

__all__ = ["classifier_dir", "peft_adapter", "remembered_traces"]

METHODS = ("none", "nf4")


def _onnx_logits(directory: Path, adapter: str | None = None) -> list[torch.Tensor]:
    session = OnnxSession(directory)
    inputs = Adapters(session, directory).inputs(adapter)
    batches = padded_batches()
    return [torch.from_numpy(session.forward(ids.numpy(), mask.numpy(), adapter=inputs)[0]) for ids, mask in batches]


def _distance(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    return max(float((one - other).abs().max()) for one, other in zip(found, expected, strict=True))


@pytest.fixture(scope="session")
def merged(
    classifier_dir: ClassifierFactory, peft_adapter: ClassifierFactory, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., ExportResult]:
    """`merged(family, method)`: a verified export in fp32, made once. Do not change it."""
    made: dict[tuple[str, str], ExportResult] = {}

    def make(family: str, method: str) -> ExportResult:
        if (family, method) not in made:
            output = tmp_path_factory.mktemp(f"{family}-{method}") / "out"
            base, adapter = classifier_dir(family), peft_adapter(family)
            made[family, method] = export_onnx(base, adapter, output=output, quantization=method)
        return made[family, method]

    return make


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_merged_export_computes_what_peft_computes(
    family: str,
    method: str,
    merged: Callable[..., ExportResult],
    classifier_dir: ClassifierFactory,
    peft_adapter: ClassifierFactory,
) -> None:
    base, adapter = classifier_dir(family), peft_adapter(family)
    result = merged(family, method)
    found, expected = _onnx_logits(result.output), peft_logits(base, adapter, method)
    assert 3 < max(float(logits.abs().max()) for logits in expected) < 300
    assert _distance(found, expected) <= 1e-3
    assert result.report is not None
    assert result.report.passed
    assert result.report.control_failed
    assert [case.name for case in result.report.cases] == ["right-padded", "left-padded", "single"]
    assert [case.control is not None for case in result.report.cases] == [True, True, False]
    for case in result.report.cases:
        assert case.export.max_abs <= 1e-3
        assert case.control is None or case.control.max_abs > 0.1
    if method == "nf4":  # the weights before quantization are another function
        assert _distance(found, peft_logits(base, adapter, "none")) > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_that_transformers_quantized_is_merged_with_query_and_value(
    family: str, classifier_dir: ClassifierFactory, peft_adapter: ClassifierFactory, tmp_path: Path
) -> None:
    adapter = peft_adapter(family, QUERY_VALUE[family])
    export_onnx(classifier_dir(family, "nf4"), adapter, output=tmp_path / "out", verify=False)
    assert _distance(_onnx_logits(tmp_path / "out"), peft_logits(classifier_dir(family), adapter, "nf4")) <= 1e-3


def test_the_base_alone_is_another_function(
    merged: Callable[..., ExportResult], classifier_dir: ClassifierFactory, tmp_path: Path
) -> None:
    """What the first test must be able to tell apart."""
    base = classifier_dir("roberta")
    export_onnx(base, output=tmp_path / "alone", quantization="none")
    alone = _onnx_logits(tmp_path / "alone")
    assert _distance(alone, peft_logits(base, None, "none")) <= 1e-3
    assert _distance(alone, _onnx_logits(merged("roberta", "none").output)) > 0.1


def test_an_export_that_loses_the_low_rank_update_fails_the_gate(
    classifier_dir: ClassifierFactory,
    peft_adapter: ClassifierFactory,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The head is right and all else is the base's: what an exporter that forgets to merge leaves."""
    monkeypatch.setattr(LoraUpdate, "merge_into", lambda update, values: values)
    with pytest.raises(ParityError, match="does not compute what was trained"):
        export_onnx(classifier_dir("bert"), peft_adapter("bert"), output=tmp_path / "out", quantization="none")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "family", ["distilbert", *(pytest.param(one, marks=pytest.mark.slow) for one in ("bert", "roberta"))]
)
def test_half_precision_passes_its_own_gate(
    family: str, classifier_dir: ClassifierFactory, peft_adapter: ClassifierFactory, tmp_path: Path
) -> None:
    base, adapter = classifier_dir(family), peft_adapter(family)
    result = export_onnx(base, adapter, output=tmp_path / "out", quantization="nf4", precision="fp16")
    assert result.report is not None
    assert result.report.passed
    assert result.report.control_failed


def test_the_files_are_those_of_a_classifier_and_say_nothing_of_this_machine(
    classifier_dir: ClassifierFactory, peft_adapter: ClassifierFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "trace_graph", trace_graph)  # traced anew each time
    base, adapter, output = classifier_dir("bert"), peft_adapter("bert"), tmp_path / "out"
    export_onnx(base, adapter, output=output, quantization="none", verify=False)
    export_onnx(base, adapter, output=tmp_path / "again", quantization="none", verify=False)
    assert tree(tmp_path / "again") == tree(output)
    assert not (output / "genai_config.json").exists()
    config = json.loads((output / "config.json").read_text())
    assert config["architectures"] == ["BertForSequenceClassification"]
    assert config["id2label"] == {str(index): name for index, name in LABELS.items()}
    graph = ir.load(output / "model.onnx")
    shapes = {value.name: str(value.shape) for value in (*graph.graph.inputs, *graph.graph.outputs)}
    assert shapes.pop("logits") == "[batch,3]"
    assert shapes == dict.fromkeys(("input_ids", "attention_mask", "token_type_ids"), "[batch,sequence]")
    assert graph.opset_imports == {"": 20, "com.microsoft": 1}
    content = (output / "model.onnx").read_bytes()
    for word in (b"stack_trace", b".py", b"pkg.torch", torch.__file__.encode()):
        assert word not in content


def test_tracing_takes_no_weights_and_every_linear_layer_is_a_site(classifier_dir: ClassifierFactory) -> None:
    from lora_deploy.export.sites import find_sites

    base = TrainingBase(classifier_dir("roberta"))
    graph = trace_graph(base.config, precision="fp32", file="config.json")
    assert all(graph.model.graph.initializers[name].const_value is None for name in graph.sources)
    assert set(graph.sources) == set(base.shapes)
    sites = find_sites(graph.model, graph.sources)
    names = {segment.parameter.removesuffix(".weight") for site in sites for segment in site.source.segments}
    assert names == set(base.linears) | set(base.heads)
    assert "roberta.encoder.layer.0.attention.self.query+key+value" in {site.name for site in sites}


def test_a_checkpoint_without_a_head_takes_the_adapters(tmp_path: Path) -> None:
    """As it is with a BERT from the hub: the number of classes is the adapter's too."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    save_classifier("roberta", base, kind=AutoModelForMaskedLM, id2label={0: "a", 1: "b"}, label2id={"a": 0, "b": 1})
    train_with_peft(base, adapter, ["query", "value"], num_labels=5)
    result = export_onnx(base, adapter, output=tmp_path / "out", quantization="none")
    assert result.report is not None
    assert result.report.control_failed
    expected = peft_logits(base, adapter, "none", num_labels=5)
    assert expected[0].shape == (4, 5)
    assert _distance(_onnx_logits(result.output), expected) <= 1e-3
    assert len(json.loads((result.output / "config.json").read_text())["id2label"]) == 5
    assert verify(result.output).passed
    with pytest.raises(CheckpointError, match="lacks") as caught:
        TrainingBase(base, task="sequence-classification")
    assert "modules_to_save: classifier" in caught.value.details["remedy"]


def test_a_regression_is_judged_by_its_value(tmp_path: Path) -> None:
    """It has one logit, of which there is neither a divergence nor a most probable class."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    save_classifier("bert", base, id2label={0: "stars"}, label2id={"stars": 0})
    train_with_peft(base, adapter, ["query", "value"])
    result = export_onnx(base, adapter, output=tmp_path / "out", quantization="none")
    assert result.report is not None
    assert result.report.control_failed
    assert all(case.export.max_abs <= 1e-3 for case in result.report.cases)
    with pytest.raises(ParityError, match="proves nothing"):
        export_onnx(base, adapter, output=tmp_path / "half", quantization="none", precision="fp16")


def test_the_older_names_of_layer_norms_are_read(
    classifier_dir: ClassifierFactory, peft_adapter: ClassifierFactory, tmp_path: Path
) -> None:
    """bert-base-uncased still has them."""
    base = Path(shutil.copytree(classifier_dir("bert"), tmp_path / "base"))
    tensors = load_file(base / "model.safetensors")
    renamed = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): values
        for name, values in tensors.items()
    }
    assert set(renamed) != set(tensors)
    save_file(renamed, base / "model.safetensors", {"format": "pt"})
    result = export_onnx(base, peft_adapter("bert"), output=tmp_path / "out", quantization="none")
    assert result.report is not None
    assert result.report.passed


@pytest.mark.parametrize("method", METHODS)
def test_a_fixed_branch_keeps_the_codes_and_has_the_adapters_head(
    method: str, classifier_dir: ClassifierFactory, peft_adapter: ClassifierFactory, tmp_path: Path
) -> None:
    base, adapter = classifier_dir("bert"), peft_adapter("bert")
    result = export_onnx(base, adapter, output=tmp_path / "out", quantization=method, merge=False, branch="fixed")
    assert result.report is not None
    assert result.report.passed
    assert result.report.control_failed
    assert (result.report.codes is not None) == (method == "nf4")
    assert _distance(_onnx_logits(result.output), peft_logits(base, adapter, method)) <= 1e-3


def test_an_adapter_without_a_head_is_swapped_in(classifier_dir: ClassifierFactory, tmp_path: Path) -> None:
    """task_type None: PEFT then saves no head, and the base's own stays."""
    base, adapter = classifier_dir("bert"), tmp_path / "mood"
    train_with_peft(base, adapter, ["query", "value", "dense"], task_type=None)
    result = export_onnx(base, adapter, output=tmp_path / "out", quantization="nf4", merge=False)
    assert result.report is not None
    assert result.report.passed
    assert {case.adapter for case in result.report.cases} == {"no adapter", "mood"}
    assert _distance(_onnx_logits(result.output, "mood"), peft_logits(base, adapter, "nf4")) <= 1e-3
    assert _distance(_onnx_logits(result.output), peft_logits(base, None, "nf4")) <= 1e-3


@pytest.mark.parametrize("method", METHODS)
def test_a_pool_of_classifiers_gives_each_text_its_own_adapter(
    method: str, classifier_dir: ClassifierFactory, tmp_path: Path
) -> None:
    """The pooler and the head read one token of each text: their masks have a dimension less."""
    base, adapters = classifier_dir("bert"), {"mood": tmp_path / "mood", "theme": tmp_path / "theme"}
    train_with_peft(base, adapters["mood"], ["query", "dense", "classifier"], task_type=None)
    train_with_peft(base, adapters["theme"], ["value", "pooler.dense"], task_type=None, r=3, lora_alpha=20)
    result = export_onnx(base, adapters, output=tmp_path / "out", quantization=method, merge=False, branch="pooled")
    assert result.report is not None
    assert result.report.passed
    assert {"mood", "theme", "mixed 1"} <= {case.adapter for case in result.report.cases}
    session = OnnxSession(result.output)
    rows = ["theme", None, "mood", "mood"]
    inputs = Adapters(session, result.output).row_inputs(rows)
    expected = {name: peft_logits(base, name and adapters[name], method) for name in (None, *adapters)}
    assert _distance(expected["mood"], expected[None]) > 0.1 < _distance(expected["theme"], expected[None])
    for number, (ids, mask) in enumerate(padded_batches()):
        found = torch.from_numpy(session.forward(ids.numpy(), mask.numpy(), adapter=inputs)[0])
        for row, name in enumerate(rows):
            assert float((found[row] - expected[name][number][row]).abs().max()) <= 1e-3


def test_a_head_that_an_adapter_trained_whole_cannot_be_pooled(
    classifier_dir: ClassifierFactory, peft_adapter: ClassifierFactory, tmp_path: Path
) -> None:
    for branch in ("pooled", "hot-swap"):
        with pytest.raises(AdapterError, match="trains parameters of the base whole") as caught:
            export_onnx(
                classifier_dir("bert"),
                {"mood": peft_adapter("bert")},
                output=tmp_path / "out",
                quantization="none",
                merge=False,
                branch=branch,
            )
        assert caught.value.details["tensor"].startswith("classifier.")
        assert caught.value.exit_code == 3
    assert not (tmp_path / "out").exists()


def test_verify_reads_base_and_head_again(merged: Callable[..., ExportResult], tmp_path: Path) -> None:
    output = Path(shutil.copytree(merged("distilbert", "nf4").output, tmp_path / "out"))
    (output / "parity.json").unlink()
    report = verify(output)
    assert report.passed
    assert report.control_failed
    assert (output / "parity.json").is_file()


def test_layers_of_the_head_are_no_linears(classifier_dir: ClassifierFactory) -> None:
    base = TrainingBase(classifier_dir("distilbert"), QuantizationScheme(method="nf4"))
    assert base.task == "sequence-classification"
    assert base.heads == ("pre_classifier", "classifier")
    assert not set(base.heads) & set(base.linears)
    assert not base.holds_codes("classifier")
    assert AutoConfig.from_pretrained(base.directory).num_labels == base.config.num_labels == 3


@pytest.mark.parametrize("branch", [None, "fixed", "hot-swap"])
def test_a_head_that_was_quantized_too_is_read_from_a_quantized_checkpoint(
    branch: str | None, classifier_dir: ClassifierFactory, tmp_path: Path
) -> None:
    """transformers quantizes it unless it is told not to. A dense checkpoint cannot say so: there is a warning."""
    dense, base, adapter = classifier_dir("roberta"), tmp_path / "base", tmp_path / "mood"
    options = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
    theirs = AutoModelForSequenceClassification.from_pretrained(
        dense, quantization_config=BitsAndBytesConfig(**options)
    )
    theirs.save_pretrained(base)
    train_with_peft(dense, adapter, ["query", "dense", "out_proj"], task_type=None)
    assert TrainingBase(base).holds_codes("classifier.out_proj")
    result = export_onnx(base, adapter, output=tmp_path / "out", merge=branch is None, branch=branch)
    assert result.warnings == ()
    keep_codes(theirs)
    model = peft.PeftModel.from_pretrained(theirs, adapter).eval()
    with torch.no_grad():
        expected = [model(input_ids=ids, attention_mask=mask).logits for ids, mask in padded_batches()]
    name = "mood" if branch == "hot-swap" else None
    assert _distance(_onnx_logits(result.output, name), expected) <= 1e-3
    if branch is None:
        other = export_onnx(dense, adapter, output=tmp_path / "other", quantization="nf4")
        assert "classifier.dense, classifier.out_proj" in other.warnings[0]
        assert _distance(_onnx_logits(other.output), expected) > 1e-2


@pytest.mark.parametrize("branch", [None, "fixed"])
@pytest.mark.parametrize("tokens", [False, True], ids=["LoRA", "tokens"])
def test_tables_of_tokens_that_an_adapter_changes(
    tokens: bool, branch: Any, classifier_dir: ClassifierFactory, tmp_path: Path
) -> None:
    base = classifier_dir("bert")
    changed: dict[str, Any] = {"trainable_token_indices": list(range(20, 90))} if tokens else {}
    targets = ["query"] if tokens else ["query", "word_embeddings", "position_embeddings"]
    train_with_peft(base, tmp_path / "own", targets, **changed)
    train_with_peft(base, tmp_path / "without", ["query"])
    options: dict[str, Any] = {"merge": branch is None, "branch": branch}
    result = export_onnx(base, tmp_path / "own", output=tmp_path / "out", quantization="none", **options)
    assert result.report is not None
    assert result.report.passed
    found = _onnx_logits(tmp_path / "out")
    assert _distance(found, peft_logits(base, tmp_path / "own", "none")) <= 1e-3
    assert _distance(found, peft_logits(base, tmp_path / "without", "none")) > 0.1
    assert _distance(found, peft_logits(base, None, "none")) > 0.1
