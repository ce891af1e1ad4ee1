"""An adapted output head, as PEFT saves it: the update, and beside it a copy of the base's own weight."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from lora_deploy.adapter import read_adapter, write_adapter
from lora_deploy.errors import AdapterError
from lora_deploy.export import export_onnx
from lora_deploy.export.onnx_adapter import convert_adapter
from lora_deploy.quantization.base import TrainingBase
from lora_deploy.verify import verify
from tests.conftest import CheckpointFactory


def test_an_output_head_as_peft_saves_it_is_an_update_and_no_trained_parameter(
    checkpoint_dir: CheckpointFactory, adapter_dir: Callable[..., Path], tmp_path: Path
) -> None:
    """PEFT saves the base's own weight of the head beside its update."""
    base = checkpoint_dir("llama")
    adapter = read_adapter(adapter_dir("llama", target_modules=["lm_head", "q_proj"]))
    copied = replace(adapter, parameters={"lm_head.weight": TrainingBase(base).tensor("lm_head.weight")})
    write_adapter(copied, tmp_path / "peft")
    options = {"merge": False, "quantization": "nf4"}
    result = export_onnx(base, {"one": tmp_path / "peft"}, output=tmp_path / "out", **options)  # type: ignore[arg-type]
    assert result.report is not None
    assert result.report.passed
    assert verify(tmp_path / "out").passed
    later = convert_adapter(tmp_path / "peft", tmp_path / "out", "later")
    assert later.read_bytes() == (tmp_path / "out" / "adapters" / "one.onnx_adapter").read_bytes()
    changed = replace(adapter, parameters={"lm_head.weight": copied.parameters["lm_head.weight"] + 1})
    write_adapter(changed, tmp_path / "trained")
    with pytest.raises(AdapterError, match="parameters of the base whole"):
        convert_adapter(tmp_path / "trained", tmp_path / "out", "never")
