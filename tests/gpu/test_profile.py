"""The reading of profiles, on the provider that every machine has."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_deploy.export import export_onnx
from tests.conftest import CheckpointFactory
from tests.gpu.profile import SHAPE_OPERATORS, operators_by_provider


@pytest.mark.parametrize("precision", ["nf4", "fp32"])
def test_a_profile_says_which_provider_ran_which_operator(
    precision: str, checkpoint_dir: CheckpointFactory, tmp_path: Path
) -> None:
    options = {"merge": False, "quantization": "nf4", "precision": precision, "verify": False}
    export_onnx(checkpoint_dir("llama"), output=tmp_path / "out", **options)  # type: ignore[arg-type]
    found = operators_by_provider(tmp_path / "out", "cpu", tmp_path)
    assert set(found) == {"CPUExecutionProvider"}
    ran = found["CPUExecutionProvider"]
    assert {"MatMulBnb4" if precision == "nf4" else "FusedMatMul", "MatMul", "Attention"} <= ran
    assert ran - SHAPE_OPERATORS
