"""T5: three graphs and one file of weights, against released PEFT on padded batches, prefill and cached decode."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx_ir as ir
import peft
import pytest
import torch
from transformers import (
    AutoModelForSeq2SeqLM,
)

from lora_deploy.adapter import LoraUpdate, load_adapter
from lora_deploy.errors import AdapterError, CheckpointError, ConfigError, OutputError, ParityError, UsageError
from lora_deploy.export import ExportResult, export_onnx, seq2seq
from lora_deploy.quantization import QuantizationScheme
from lora_deploy.quantization.base import TrainingBase
from lora_deploy.run import OnnxModel
from lora_deploy.verify import verify
from lora_deploy.verify.seq2seq import open_parts, run_parts
from tests.encoder_decoders import (
    TARGETS,
    distance,
    load_theirs,
    padded_batches,
    peft_outputs,
    remembered_traces,
    save_t5,
    train_with_peft,
)

Factory = Callable[[str], tuple[Path, Path]]


@pytest.fixture(scope="module", autouse=True)
def _remembered() -> Iterator[None]:
    with remembered_traces():
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Factory:
    """`trained(kind)`: a base, and an adapter of all linear layers of its blocks. Do not change them."""
    made: dict[str, tuple[Path, Path]] = {}

    def make(kind: str) -> tuple[Path, Path]:
        if kind not in made:
            directory = tmp_path_factory.mktemp(kind)
            save_t5(kind, directory / "base")
            train_with_peft(directory / "base", directory / "adapter", TARGETS)
            made[kind] = directory / "base", directory / "adapter"
        return made[kind]

    return make


@pytest.fixture(scope="module")
def merged(trained: Factory, tmp_path_factory: pytest.TempPathFactory) -> ExportResult:
    """A merged export of the tied model. Do not change it."""
    base, adapter = trained("tied")
    return export_onnx(base, adapter, output=tmp_path_factory.mktemp("merged") / "out", quantization="none")


@pytest.mark.parametrize("branch", [None, "fixed", "hot-swap"])
@pytest.mark.parametrize("method", ["none", "nf4"])
@pytest.mark.parametrize("kind", ["tied", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("gated", "mt5"))])
def test_encoder_prefill_and_cached_decode_are_those_of_peft(
    kind: str, method: str, branch: str | None, trained: Factory, tmp_path: Path
) -> None:
    base, adapter = trained(kind)
    result = export_onnx(
        base, adapter, output=tmp_path / "out", quantization=method, merge=branch is None, branch=branch
    )
    assert result.report is not None
    assert result.report.passed
    assert result.report.control_failed
    assert (result.report.codes is not None) == (method == "nf4" and branch is not None)
    batches = ("right-padded", "left-padded", "single")
    assert {case.name for case in result.report.cases} == {
        f"{part}, {batch}" for part in ("encoder", "prefill", "decode") for batch in batches
    }
    expected = peft_outputs(base, adapter, method)
    name = "adapter" if branch == "hot-swap" else None
    assert 3 < max(float(logits.abs().max()) for _, logits in expected) < 30
    assert ("lm_head.weight" in TrainingBase(base).aliases) == (kind == "tied")
    assert distance(result.output, expected, name) <= 1e-3
    alone = peft_outputs(base, None, method)
    assert min(float((one[1] - two[1]).abs().max()) for one, two in zip(alone, expected, strict=True)) > 0.5
    assert distance(result.output, alone, name) > 0.1
    if method == "nf4":  # the weights before quantization are another function
        assert distance(result.output, peft_outputs(base, adapter, "none"), name) > 1e-2
    if branch == "hot-swap":
        assert distance(result.output, alone) <= 1e-3


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
@pytest.mark.filterwarnings("ignore:Adapter 'default'. .* have invalid shape. .*lora_B.bias")
@pytest.mark.parametrize("setting", ["use_dora", "lora_bias"])
@pytest.mark.parametrize("branch", [None, "fixed"])
def test_a_dora_and_a_bias_of_b_are_in_every_graph(
    branch: str | None, setting: str, trained: Factory, tmp_path: Path
) -> None:
    base, _ = trained("tied")
    train_with_peft(base, tmp_path / "adapter", TARGETS, **{setting: True})
    result = export_onnx(
        base, tmp_path / "adapter", output=tmp_path / "out", quantization="none", merge=branch is None, branch=branch
    )
    assert distance(result.output, peft_outputs(base, tmp_path / "adapter", "none")) <= 1e-3
    assert distance(result.output, peft_outputs(base, None, "none")) > 0.1


def test_a_lost_update_fails_the_gate(trained: Factory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter = trained("tied")
    monkeypatch.setattr(LoraUpdate, "merge_into", lambda update, values: values)
    with pytest.raises(ParityError, match="does not compute what was trained"):
        export_onnx(base, adapter, output=tmp_path / "out", quantization="none")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_an_adapter_of_the_decoder_and_of_the_tied_head_unties_it(trained: Factory, tmp_path: Path) -> None:
    """The encoder is the base's then, and no control; the embedding keeps its values."""
    base, _ = trained("tied")
    adapter = tmp_path / "adapter"
    train_with_peft(base, adapter, ["lm_head"])
    result = export_onnx(base, adapter, output=tmp_path / "out", quantization="none")
    assert result.report is not None
    for case in result.report.cases:
        assert (case.control is None) == case.name.startswith("encoder")
    assert distance(result.output, peft_outputs(base, adapter, "none")) <= 1e-3


def test_the_files_are_those_that_optimum_opens(merged: ExportResult) -> None:
    output = merged.output
    assert {file.name for file in output.glob("*.onnx")} == {"model.onnx", *seq2seq.PARTS}
    assert len(list(output.glob("*.onnx.data"))) == 1
    names = {
        file: [[value.name for value in side] for side in (graph.inputs, graph.outputs)]
        for file in seq2seq.PARTS
        for graph in (ir.load(output / file).graph,)
    }
    cache = [
        f"{layer}.{side}.{kind}" for layer in (0, 1) for side in ("decoder", "encoder") for kind in ("key", "value")
    ]
    own = [name for name in cache if ".decoder." in name]
    assert names["encoder_model.onnx"] == [["input_ids", "attention_mask"], ["last_hidden_state"]]
    assert names["decoder_model.onnx"] == [
        ["encoder_attention_mask", "input_ids", "encoder_hidden_states"],
        ["logits", *(f"present.{name}" for name in cache)],
    ]
    assert names["decoder_with_past_model.onnx"] == [
        ["encoder_attention_mask", "input_ids", *(f"past_key_values.{name}" for name in cache)],
        ["logits", *(f"present.{name}" for name in own)],
    ]


def test_every_weight_is_stored_once(merged: ExportResult, trained: Factory) -> None:
    """Both decoders read the same, and the embedding is encoder's, decoder's and head's."""
    parameters = sum(values.numel() for values in load_theirs(trained("tied")[0], "none").parameters())
    file = next(merged.output.glob("*.onnx.data"))
    assert file.stat().st_size < 4 * parameters * 1.2 + 100 * 4096  # with what alignment takes


def test_verify_reads_all_three_graphs_again(merged: ExportResult, tmp_path: Path) -> None:
    output = Path(shutil.copytree(merged.output, tmp_path / "out"))
    (output / "parity.json").unlink()
    assert verify(output).passed
    assert (output / "parity.json").is_file()
    for name in seq2seq.PARTS:
        broken = Path(shutil.copytree(merged.output, tmp_path / name))
        (broken / name).write_bytes((broken / name).read_bytes()[:-1])
        with pytest.raises(CheckpointError, match="a file of the export is damaged"):
            verify(broken)


@pytest.mark.slow
def test_one_export_takes_the_place_of_another_in_one_step_or_not_at_all(
    merged: ExportResult, trained: Factory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = Path(shutil.copytree(merged.output, tmp_path / "out"))
    before = {file.name: file.read_bytes() for file in output.iterdir()}
    base, adapter = trained("gated")
    again = {"output": output, "quantization": "none", "overwrite": True, "verify": False}
    with monkeypatch.context() as patch:
        patch.setattr("lora_deploy.export.commit._exchange", lambda first, second: False)
        with pytest.raises(OutputError, match="only in one step"):
            export_onnx(base, adapter, **again)
    assert {file.name: file.read_bytes() for file in output.iterdir()} == before
    export_onnx(base, adapter, **again)
    assert verify(output).passed
    assert {file.name for file in output.iterdir()} >= {"model.onnx", *seq2seq.PARTS}
    assert not set(before.values()) & {(output / name).read_bytes() for name in ("model.onnx", *seq2seq.PARTS)}


@pytest.mark.parametrize("stopped", [*seq2seq.PARTS, "model.onnx"])
def test_an_export_that_is_stopped_at_any_file_leaves_nothing(
    stopped: str, trained: Factory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where files are moved one by one: `model.onnx` comes last, and without it there is no export."""
    own, order = Path.replace, []

    def replace(self: Path, target: Path) -> Path:
        order.append(self.name)
        if self.name == stopped:
            raise OSError(28, "No space left on device", str(self))
        return own(self, target)

    monkeypatch.setattr("lora_deploy.export.commit.can_rename", lambda output: False)
    monkeypatch.setattr(Path, "replace", replace)
    base, adapter = trained("tied")
    with pytest.raises(OutputError):
        export_onnx(base, adapter, output=tmp_path / "out", quantization="none", verify=False)
    assert "model.onnx" not in order[:-1]
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_made_for_an_encoder_decoder_is_refused(trained: Factory, tmp_path: Path) -> None:
    base, adapter = trained("tied")
    for options in (
        {"precision": "int4"},
        {"precision": "bf16", "provider": "cuda"},
        {"merge": False, "branch": "pooled"},
        {"merge": False, "adapter_precision": "int8"},
    ):
        with pytest.raises(UsageError, match="not made for encoder-decoders"):
            export_onnx(base, {"one": adapter}, output=tmp_path / "out", quantization="none", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("config", [{}, {"trainable_token_indices": {"shared": [5, 130]}}], ids=["LoRA", "tokens"])
def test_tables_of_tokens_are_refused_by_name(config: dict[str, Any], trained: Factory, tmp_path: Path) -> None:
    base, _ = trained("tied")
    train_with_peft(base, tmp_path / "own", ["q"] if config else ["q", "shared"], **config)
    with pytest.raises(AdapterError, match="table of tokens that an export cannot change") as caught:
        export_onnx(base, tmp_path / "own", output=tmp_path / "out", quantization="none")
    assert caught.value.details["tensor"] == "shared"
    with pytest.raises(ConfigError, match="look tokens up by themselves"):
        load_adapter(load_theirs(base, "none"), tmp_path / "own")
    assert not (tmp_path / "out").exists()


def test_onnx_model_says_what_opens_it(merged: ExportResult) -> None:
    with pytest.raises(UsageError, match="is an encoder-decoder") as caught:
        OnnxModel(merged.output)
    assert "ORTModelForSeq2SeqLM" in caught.value.details["remedy"]


def test_transformers_keeps_wo_in_floats(trained: Factory) -> None:
    base, _ = trained("gated")
    opened = TrainingBase(base, QuantizationScheme(method="nf4"))
    kept = {name for name, module in load_theirs(base, "nf4").named_modules() if type(module) is torch.nn.Linear}
    assert {name for name in (*opened.linears, *opened.heads) if not opened.holds_codes(name)} == kept
    assert "encoder.block.0.layer.1.DenseReluDense.wo" in kept


@pytest.mark.slow
def test_wo_keeps_its_precision_where_the_rest_is_loaded_in_float16(trained: Factory, tmp_path: Path) -> None:
    """As transformers loads it; rounded to float16 it would fail the gate."""
    dense, adapter = trained("tied")
    base = Path(shutil.copytree(dense, tmp_path / "base"))
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"dtype": "float16"}))
    result = export_onnx(base, adapter, output=tmp_path / "out", quantization="none", precision="fp32")
    theirs = AutoModelForSeq2SeqLM.from_pretrained(base, dtype="auto")
    assert theirs.shared.weight.dtype == torch.float16
    assert theirs.encoder.block[0].layer[1].DenseReluDense.wo.weight.dtype == torch.float32
    model = peft.PeftModel.from_pretrained(theirs.float(), adapter).eval()
    parts = open_parts(result.output)
    for batch in padded_batches():
        with torch.no_grad():
            logits = model(
                input_ids=batch.input_ids, attention_mask=batch.attention_mask, decoder_input_ids=batch.decoder_ids
            ).logits
        assert float((run_parts(parts, result.output, None, batch).logits - logits).abs().max()) <= 1e-3
