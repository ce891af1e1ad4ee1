"""SmolLM2-135M-Instruct: a few steps of training on NF4, then the export against the trained model, token for token."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lora_deploy.adapter import apply_adapter, read_adapter
from lora_deploy.quantization import QuantizationScheme
from lora_deploy.quantization.base import TrainingBase
from lora_deploy.run import OnnxModel
from lora_deploy.verify.reference import load_twin
from tests.real.conftest import NEW_TOKENS, Trained, genai_tokens, run_command, twin_tokens

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def exports(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """The merged export in each precision that a CPU runs."""
    base, adapter, _ = trained
    outputs = {}
    for precision in ("fp32", "fp16"):
        outputs[precision] = tmp_path_factory.mktemp("exports") / precision
        options = ("--precision", precision, "--output", outputs[precision], "--quiet")
        run_command("export", "--merge", "--model", base, "--adapter", adapter, *options)
    yield outputs
    for directory in outputs.values():
        shutil.rmtree(directory)


def test_training_lowers_the_loss_and_records_its_base(trained: Trained) -> None:
    base, adapter, _ = trained
    log = [json.loads(line) for line in (adapter / "training_log.jsonl").read_text().splitlines()]
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert losses[-1] < losses[0] / 3
    record = json.loads((adapter / "lora_deploy.json").read_text())
    assert record["quantization"]["method"] == "nf4"
    assert record["quantization"]["double_quant"] is True
    assert record["base_sha256"] == TrainingBase(base).sha256()


def test_fp32_is_exact_to_a_thousandth_of_a_logit_and_the_base_alone_is_far_off(exports: dict[str, Path]) -> None:
    report = json.loads((exports["fp32"] / "parity.json").read_text())
    assert len(report["cases"]) == 6
    for case in report["cases"]:
        assert case["export"]["max_abs"] <= 1e-3
        assert case["export"]["mean_kl"] <= 1e-6
        assert case["export"]["top1"] == 1.0
        assert case["control"]["mean_kl"] > 1e-2
        assert case["control"]["max_abs"] > 1.0


def test_fp16_keeps_the_distribution_and_the_base_alone_does_not(exports: dict[str, Path]) -> None:
    report = json.loads((exports["fp16"] / "parity.json").read_text())
    for case in report["cases"]:
        assert case["export"]["mean_kl"] <= 1e-4
        assert case["export"]["top1"] >= 0.995
        assert case["control"]["mean_kl"] > 1e-2


def test_pytorch_onnxruntime_and_genai_give_the_same_tokens(
    trained: Trained, exports: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    base, adapter, prompts = trained
    model = OnnxModel(exports["fp32"])
    encoded = [model.encode(prompt) for prompt in prompts]
    ours = [list(model.generate_tokens(ids, max_new_tokens=NEW_TOKENS)) for ids in encoded]
    twin: Any = load_twin(TrainingBase(base, QuantizationScheme(method="nf4")))
    untrained = [twin_tokens(twin, ids) for ids in encoded]
    apply_adapter(twin, read_adapter(adapter)).eval()
    assert ours == [twin_tokens(twin, ids) for ids in encoded]
    assert ours == genai_tokens(exports["fp32"], encoded)
    assert all(answer != before for answer, before in zip(ours, untrained, strict=True))
    capsys.readouterr()
    run_command("run", exports["fp32"], "--prompt", prompts[0], "--max-new-tokens", NEW_TOKENS)
    assert capsys.readouterr().out == model.tokenizer.decode(ours[0], skip_special_tokens=True) + "\n"
