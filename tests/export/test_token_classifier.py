"""Classifiers of tokens: logits of every token, compared with released PEFT wherever there is a token."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoModelForMaskedLM, AutoModelForTokenClassification

from lora_deploy.adapter import LoraUpdate
from lora_deploy.errors import ParityError
from lora_deploy.export import export_onnx
from lora_deploy.manifest import Manifest
from lora_deploy.quantization.base import TrainingBase
from lora_deploy.run import OnnxSession
from lora_deploy.run.adapters import Adapters
from lora_deploy.task import find_task
from lora_deploy.verify import verify
from tests.classifiers import (
    FAMILIES,
    LABELS,
    OF_TOKENS,
    padded_batches,
    peft_logits,
    remembered_traces,
    save_classifier,
    train_with_peft,
)

__all__ = ["remembered_traces"]

METHODS = ("none", "nf4")
Factory = Callable[[str], tuple[Path, Path]]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Factory:
    """`trained(family)`: a base and an adapter of all its linear layers and of its whole head. Do not change them."""
    made: dict[str, tuple[Path, Path]] = {}

    def make(family: str) -> tuple[Path, Path]:
        if family not in made:
            directory = tmp_path_factory.mktemp(f"{family}-tokens")
            base, adapter = directory / "base", directory / "adapter"
            save_classifier(family, base, kind=AutoModelForTokenClassification)
            train_with_peft(base, adapter, OF_TOKENS[family], task_type="TOKEN_CLS")
            made[family] = base, adapter
        return made[family]

    return make


def _distance(directory: Path, expected: list[torch.Tensor], adapter: str | None = None) -> float:
    """Largest difference of a logit of a token; what the model gives for padding means nothing."""
    session, worst = OnnxSession(directory), 0.0
    inputs = Adapters(session, directory).inputs(adapter)
    for (ids, mask), logits in zip(padded_batches(), expected, strict=True):
        found = torch.from_numpy(session.forward(ids.numpy(), mask.numpy(), adapter=inputs)[0])
        assert found.shape == logits.shape == (*ids.shape, len(LABELS))
        worst = max(worst, float((found - logits)[mask.bool()].abs().max()))
    return worst


@pytest.mark.parametrize("branch", [None, "fixed"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_token_gets_the_logits_of_peft(
    family: str, method: str, branch: str | None, trained: Factory, tmp_path: Path
) -> None:
    base, adapter = trained(family)
    result = export_onnx(
        base, adapter, output=tmp_path / "out", quantization=method, merge=branch is None, branch=branch
    )
    expected = peft_logits(base, adapter, method)
    assert 3 < max(float(logits.abs().max()) for logits in expected) < 300
    assert _distance(result.output, expected) <= 1e-3
    assert result.report is not None
    assert result.report.control_failed
    assert [case.name for case in result.report.cases] == ["right-padded", "left-padded", "single"]
    for case in result.report.cases:
        assert case.export.tokens >= 26  # of every token, not of every text
        assert case.control is not None
        assert case.control.max_abs > 0.1
    if method == "nf4":  # the weights before quantization are another function
        assert _distance(result.output, peft_logits(base, adapter, "none")) > 1e-2
    assert _distance(result.output, peft_logits(base, None, method)) > 0.1


def test_an_export_that_loses_the_update_fails_the_gate(
    trained: Factory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = trained("bert")
    monkeypatch.setattr(LoraUpdate, "merge_into", lambda update, values: values)
    with pytest.raises(ParityError, match="does not compute what was trained"):
        export_onnx(base, adapter, output=tmp_path / "out", quantization="none")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_without_a_head_is_swapped_in(family: str, trained: Factory, tmp_path: Path) -> None:
    """The classifier, whose PEFT update is low-rank here, has a slot as every other layer."""
    base, _ = trained(family)
    train_with_peft(base, tmp_path / "names", [*OF_TOKENS[family], "classifier"], task_type=None)
    result = export_onnx(base, tmp_path / "names", output=tmp_path / "out", quantization="nf4", merge=False)
    assert result.report is not None
    assert result.report.passed
    assert _distance(result.output, peft_logits(base, tmp_path / "names", "nf4"), "names") <= 1e-3
    assert _distance(result.output, peft_logits(base, None, "nf4")) <= 1e-3


def test_a_checkpoint_without_a_head_takes_the_adapters(tmp_path: Path) -> None:
    """The adapter's task_type is all that says what the model is for."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    save_classifier("bert", base, kind=AutoModelForMaskedLM)
    options = {"id2label": {0: "O", 1: "B", 2: "I", 3: "X"}, "label2id": {"O": 0, "B": 1, "I": 2, "X": 3}}
    torch.manual_seed(1)
    model = peft.get_peft_model(
        AutoModelForTokenClassification.from_pretrained(base, **options),
        peft.LoraConfig(target_modules=["query", "value"], task_type="TOKEN_CLS"),
    )
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn_like(parameter) * (0.2 if "lora_" in name else 2.0)
    model.save_pretrained(adapter)
    result = export_onnx(base, adapter, output=tmp_path / "out", quantization="none")
    assert Manifest.load(result.output).task == "token-classification"
    config = json.loads((result.output / "config.json").read_text())
    assert config["architectures"] == ["BertForTokenClassification"]
    ids, mask = padded_batches()[0]
    with torch.no_grad():
        expected = model.eval()(input_ids=ids, attention_mask=mask).logits
    found = torch.from_numpy(OnnxSession(result.output).forward(ids.numpy(), mask.numpy())[0])
    assert found.shape[-1] == 4
    assert float((found - expected)[mask.bool()].abs().max()) <= 1e-3
    assert verify(result.output).passed


def test_the_task_is_the_checkpoints_or_the_adapters(trained: Factory) -> None:
    assert TrainingBase(trained("bert")[0]).task == "token-classification"
    assert find_task(["RobertaForMaskedLM"], ["TOKEN_CLS"]) == "token-classification"
    assert find_task(["BertForSequenceClassification"], [None]) == "sequence-classification"
    assert find_task(["LlamaForCausalLM"], ["CAUSAL_LM"]) == "causal-lm"
