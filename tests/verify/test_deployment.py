"""The deployed weights against the trained ones: on texts, and in the direction of the update; and the limit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_deploy.adapter import read_adapter
from lora_deploy.errors import DataError, ParityError, UsageError
from lora_deploy.export import export_onnx
from lora_deploy.integrity import hash_file
from lora_deploy.quantization import quantize
from lora_deploy.quantization.base import TrainingBase
from lora_deploy.requantize import Requantization
from lora_deploy.requantize.text import load_text, pick_text, rows_taken
from lora_deploy.verify import verify
from lora_deploy.verify.deployed import DeployedWeights
from lora_deploy.verify.deployment import DeploymentResult, held_out_texts, measure_deployment
from lora_deploy.verify.texts import TextResult
from tests.classifiers import ClassifierFactory, classifier_dir, peft_adapter, remembered_traces
from tests.commands import Command, assert_one_message
from tests.conftest import CheckpointFactory
from tests.export.conftest import BranchExport, BranchFactory
from tests.train.conftest import char_tokenizer

__all__ = ["classifier_dir", "peft_adapter", "remembered_traces"]


def _rounded(factory: BranchFactory, bits: int = 4, family: str = "llama", **options: Any) -> BranchExport:
    asked = Requantization(bits, blocksize=16, rows=0)  # type: ignore[arg-type]
    return factory(family, "nf4", None, precision=f"int{bits}", requantization=asked, **options)


def _measure(export: BranchExport, directory: Path | None = None) -> DeploymentResult:
    texts = held_out_texts(export.output, export.base, None, [])
    adapter = read_adapter(export.adapters["own"])
    return measure_deployment(directory or export.output, export.base, adapter, texts)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_int8_keeps_the_update_and_int4_less_of_the_function(family: str, branch_export: BranchFactory) -> None:
    int8, int4 = (_measure(_rounded(branch_export, bits, family)) for bits in (8, 4))
    assert int8.survives == pytest.approx(1, abs=0.01)
    assert set(int8.layers) == set(read_adapter(_rounded(branch_export, 8, family).adapters["own"]).updates)
    assert all(share == pytest.approx(1, abs=0.05) for share in int8.layers.values())
    (eight,), (four,) = int8.texts, int4.texts
    assert eight.kl < four.kl / 10
    assert eight.base_kl == pytest.approx(four.base_kl)
    assert eight.base_kl is not None
    assert eight.base_kl > four.kl
    assert eight.reference_loss == four.reference_loss
    assert int8.warnings() == []
    # 16 codes and a float32 scale; 112 and 64 columns are whole blocks.
    assert (int8.bits, int4.bits) == (10, 6)


def test_a_base_that_was_rounded_without_its_update_has_none_of_it(branch_export: BranchFactory) -> None:
    export, bare = _rounded(branch_export), _rounded(branch_export, adapters={})
    found = _measure(export, bare.output)
    assert found.survives == pytest.approx(0, abs=0.02)
    assert "only" in found.warnings()[0]
    (measured,) = found.texts
    assert measured.base_kl is not None
    assert measured.kl > 0.9 * measured.base_kl


def test_a_small_update_does_not_survive_a_merge_back_into_nf4(
    branch_export: BranchFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    export = _rounded(branch_export, 8, adapters={"own": {"scale": 0.01}})
    assert _measure(export).survives == pytest.approx(1, abs=0.1)
    base, adapter = export.base, read_adapter(export.adapters["own"])

    def read(self: DeployedWeights, module: str) -> torch.Tensor:
        values = real(self, module)
        if module in adapter.updates:
            values = base.weight(module).dequantize() + adapter.delta_weight(module)
            values = quantize(values, base.scheme).dequantize()
        return values

    real = DeployedWeights.read
    monkeypatch.setattr(DeployedWeights, "read", read)
    found = _measure(export)
    assert found.survives is not None
    assert abs(found.survives) < 0.2
    assert any("rounded away" in warning and "--precision int8" in warning for warning in found.warnings())


def test_int8_branches_are_measured_too(branch_export: BranchFactory) -> None:
    export = branch_export("llama", "nf4", "fixed", adapter_precision="int8", verify=True)
    report = export.result.report
    assert report is not None
    assert report.deployment is not None
    assert report.deployment.survives == pytest.approx(1, abs=0.01)
    assert report.deployment.texts[0].kl < 1e-2


def test_an_export_of_the_trained_weights_has_no_deployment(branch_export: BranchFactory, command: Command) -> None:
    export = branch_export("llama", "nf4", "fixed")
    ended = command("verify", export.output, "--max-kl", 1e-3)
    assert ended.code == 0
    assert "the deployed weights are the trained ones" in ended.out
    report = verify(export.output, max_kl=0.0)
    assert report.deployment is None
    assert not report.passed
    with pytest.raises(ParityError, match="--max-kl"):
        report.require(export.output)


@pytest.mark.parametrize("family", ["bert"])
def test_a_classifier_is_measured_on_the_batches(
    family: str, classifier_dir: ClassifierFactory, peft_adapter: ClassifierFactory, tmp_path: Path
) -> None:
    report = export_onnx(
        classifier_dir(family),
        peft_adapter(family),
        output=tmp_path / "out",
        quantization="nf4",
        precision="int8",
        requantization=Requantization(8, rows=0),
    ).report
    assert report is not None
    assert report.passed
    assert report.deployment is not None
    assert [found.name for found in report.deployment.texts] == ["right-padded", "left-padded", "single"]
    assert all(found.loss is None and found.base_kl is not None for found in report.deployment.texts)
    assert report.deployment.survives == pytest.approx(1, abs=0.05)
    report.deployment.table()


@pytest.fixture
def exported(
    checkpoint_dir: CheckpointFactory, adapter_dir: Callable[..., Path], command: Command
) -> Callable[..., Any]:
    """`exported(output, *more)`: the command, for int4 without calibration."""

    def export(output: Path, *more: object) -> Any:
        asked = ("--model", checkpoint_dir("llama"), "--adapter", adapter_dir("llama"), "--quantization", "nf4")
        rounding = ("--merge", "--precision", "int4", "--block-size", 16, "--calibration-rows", 0)
        return command("export", *asked, *rounding, "--output", output, *more)

    return export


def test_a_limit_on_the_divergence_is_kept_or_ends_with_four(exported: Callable[..., Any], tmp_path: Path) -> None:
    ended = exported(tmp_path / "out", "--quiet", "--max-kl", 1e-6)
    assert_one_message(ended, 4, "--max-kl", "KL", "at most 1e-06", "--branch")
    assert list(tmp_path.iterdir()) == []
    ended = exported(tmp_path / "out", "--max-kl", 100)
    assert ended.code == 0
    for said in ("Deployed weights", "general", "of the update survives", "accuracy level 4", "bits a weight"):
        assert said in ended.out
    report = json.loads((tmp_path / "out" / "parity.json").read_text())
    assert report["max_kl"] == 100
    assert report["deployment"]["texts"][0]["kl"] > 1e-6


def test_options_that_cannot_be_are_refused(exported: Callable[..., Any], tmp_path: Path) -> None:
    assert_one_message(exported(tmp_path / "out", "--quiet", "--max-kl", -1), 2, "not negative")
    assert_one_message(exported(tmp_path / "out", "--quiet", "--max-kl", 1, "--no-verify"), 2, "--no-verify")
    missing = tmp_path / "nothing.jsonl"
    ended = exported(tmp_path / "out", "--quiet", "--compare-on", missing)
    assert_one_message(ended, 3, missing, "--compare-on")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UsageError):
        verify(tmp_path, max_kl=float("nan"))


@pytest.fixture
def written(own_checkpoint: CheckpointFactory, tmp_path: Path) -> tuple[Path, Path]:
    """A base with a tokenizer of letters, and eight rows of text."""
    base = own_checkpoint("llama", max_position_embeddings=64)
    char_tokenizer().save_pretrained(base)
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"text": f"{'abcdefgh'[row] * 4} one row"}) + "\n" for row in range(8)))
    return base, data


def test_rows_that_were_calibrated_on_are_left_out(
    written: tuple[Path, Path], adapter_dir: Callable[..., Path], tmp_path: Path
) -> None:
    directory, data = written
    asked = Requantization(4, blocksize=16, rows=16, data=data)
    result = export_onnx(
        directory,
        adapter_dir("llama"),
        output=tmp_path / "out",
        quantization="nf4",
        precision="int4",
        requantization=asked,
    )
    assert result.report is not None
    assert result.report.deployment is not None
    assert [found.name for found in result.report.deployment.texts] == ["task", "general"]
    assert [found.source for found in result.report.deployment.texts] == ["data.jsonl", "held_out.jsonl"]
    assert all(found.held_out for found in result.report.deployment.texts)
    base = TrainingBase(directory)
    taken = pick_text(base, data, [], 16)
    assert rows_taken(taken) == {hash_file(data): 4}
    left = held_out_texts(tmp_path / "out", base, None, [None])
    assert [len(one) for one in left] == [4, 6]
    for before, after in zip(taken, left, strict=True):
        rows = {tuple(row.tolist()[:20]) for row in before.input_ids}
        assert not rows & {tuple(row.tolist()[:20]) for row in after.input_ids}
        assert after.held_out
    assert not load_text("task", data, base, 4, taken=8).held_out
    with pytest.raises(DataError):
        verify(tmp_path / "out", data=tmp_path / "nothing.jsonl")


def test_a_text_on_which_much_is_lost_is_warned_of() -> None:
    lost = TextResult(name="task", tokens=9, kl=0.3, top1=0.5, loss=1.0, reference_loss=0.5, base_kl=1.0)
    found = DeploymentResult(texts=[lost], bits=5, survives=0.9, layers={"q": 0.9})
    (warning,) = found.warnings()
    assert "30% as much as the whole training" in warning
    assert "--branch" in warning
    kept = found.model_copy(update={"texts": [lost.model_copy(update={"kl": 0.2})]})
    assert kept.warnings() == []
    known = kept.model_copy(update={"texts": [kept.texts[0].model_copy(update={"held_out": False})]})
    assert "calibrated" in known.warnings()[0]
    assert "least in q: 90.0%" in found.summary()
    nan = found.model_copy(update={"texts": [lost, lost.model_copy(update={"kl": float("nan")})]})
    assert nan.largest_kl != nan.largest_kl


def test_verify_measures_again(branch_export: BranchFactory, tmp_path: Path) -> None:
    export = _rounded(branch_export)
    directory = Path(shutil.copytree(export.output, tmp_path / "out"))
    report = verify(directory)
    assert report.passed
    assert report.deployment == _measure(export)
