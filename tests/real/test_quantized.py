"""SmolLM2-135M-Instruct in 8 and 4 bits: the export is the twin of its own weights, and these keep what was learnt."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lora_deploy.run import OnnxModel
from lora_deploy.verify.tolerances import TOLERANCES
from tests.real.conftest import NEW_TOKENS, Trained, genai_tokens, run_command

pytestmark = [pytest.mark.real, pytest.mark.slow]

# A little text, so that the test is quick; the default calibrates on more.
CALIBRATION = ("--calibration-rows", 24)


@pytest.fixture(scope="module")
def exports(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """Merged exports whose weights are rounded."""
    outputs = {}
    for name, options in {
        "int8": ("--precision", "int8", *CALIBRATION),
        "int4": ("--precision", "int4", *CALIBRATION),
        "int4 rounded": ("--precision", "int4", "--calibration-rows", 0),
    }.items():
        outputs[name] = tmp_path_factory.mktemp("exports") / "out"
        rest = ("--adapter", trained.adapter, "--output", outputs[name], "--quiet")
        run_command("export", "--merge", "--model", trained.base, *options, *rest)
    yield outputs
    for directory in outputs.values():
        shutil.rmtree(directory)


def _report(export: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((export / "parity.json").read_text())
    return report


def _kl(export: Path) -> dict[str, float]:
    return {text["name"]: text["kl"] for text in _report(export)["deployment"]["texts"]}


@pytest.mark.parametrize("name", ["int8", "int4", "int4 rounded"])
def test_the_export_computes_what_its_weights_say(exports: dict[str, Path], name: str) -> None:
    report = _report(exports[name])
    assert report["precision"] == "fp32"
    for case in report["cases"]:
        assert case["export"]["mean_kl"] <= TOLERANCES["fp32"].kl
        assert case["export"]["max_abs"] <= 1e-3
        assert case["control"]["mean_kl"] > 1e-2
    # Level 4 rounds the activations, which is reported apart.
    assert 1e-6 < report["activation_rounding"]["mean_kl"] < 0.1


def test_what_was_learnt_survives(exports: dict[str, Path]) -> None:
    for name in ("int8", "int4"):
        deployment = _report(exports[name])["deployment"]
        task = next(text for text in deployment["texts"] if text["name"] == "task")
        assert task["base_kl"] > 0.5
        assert task["kl"] < (1e-4 if name == "int8" else 2e-2)
        assert deployment["survives"] == pytest.approx(1.0, abs=0.1)
    assert _report(exports["int4"])["deployment"]["bits"] == pytest.approx(5.0)  # float32 scales
    assert _report(exports["int8"])["deployment"]["bits"] == pytest.approx(9.0)


def test_calibration_keeps_a_multiple_of_what_rounding_keeps(exports: dict[str, Path]) -> None:
    calibrated, rounded = _kl(exports["int4"]), _kl(exports["int4 rounded"])
    assert calibrated["task"] < 0.5 * rounded["task"]
    assert calibrated["general"] < 0.6 * rounded["general"]


def test_onnxruntime_and_genai_give_the_same_tokens(trained: Trained, exports: dict[str, Path]) -> None:
    model = OnnxModel(exports["int8"])
    encoded = [model.encode(prompt) for prompt in trained.prompts]
    ours = [list(model.generate_tokens(ids, max_new_tokens=NEW_TOKENS)) for ids in encoded]
    assert ours == genai_tokens(exports["int8"], encoded)
    assert all("{" in model.tokenizer.decode(answer) for answer in ours)


def test_the_gate_for_deployed_weights(trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--precision", "int4", "--calibration-rows", 0, "--max-kl", 1e-4, "--output", tmp_path / "out")
    with pytest.MonkeyPatch.context() as patch:
        arguments = ("export", "--merge", "--model", trained.base, "--adapter", trained.adapter, *options)
        patch.setattr("sys.argv", ["lora-deploy", *map(str, arguments)])
        from lora_deploy import cli

        with pytest.raises(SystemExit) as ended:
            cli.main()
    assert ended.value.code == 4
    assert not (tmp_path / "out").exists()
    assert "0.0001" in capsys.readouterr().err
