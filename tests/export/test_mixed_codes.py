"""Layers of one site whose codes are of different kinds, and scales that the type of the computation cannot hold."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_deploy.errors import InputError
from lora_deploy.export import export_onnx
from lora_deploy.manifest import Manifest
from lora_deploy.verify import verify
from tests.conftest import CheckpointFactory, save_tiny
from tests.export.conftest import SHORT

_PROJECTIONS = "model.layers.0.self_attn."


def _quantize_again(directory: Path, dense: Path, layer: str, blocksize: int, kind: str) -> None:
    """Give one layer of a quantized checkpoint other codes, as a tool that mixes them would save it."""
    file = next(directory.glob("*.safetensors"))
    tensors = {name: values for name, values in load_file(file).items() if not name.startswith(f"{layer}.weight")}
    weight = load_file(next(dense.glob("*.safetensors")))[f"{layer}.weight"]
    codes, state = bnb.quantize_4bit(weight, blocksize=blocksize, compress_statistics=True, quant_type=kind)
    tensors[f"{layer}.weight"] = codes
    packed = state.as_dict(packed=True)
    tensors |= {f"{layer}.weight.{name}": values.contiguous() for name, values in packed.items()}
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("options", [{}, {"expand": True}, {"precision": "int8"}])
@pytest.mark.parametrize(
    ("layer", "blocksize", "kind"), [("q_proj", 128, "nf4"), ("k_proj", 128, "nf4"), ("k_proj", 64, "fp4")]
)
def test_each_layer_keeps_its_own_kind_of_codes(
    layer: str,
    blocksize: int,
    kind: str,
    options: dict[str, Any],
    own_checkpoint: CheckpointFactory,
    checkpoint_dir: CheckpointFactory,
    adapter_dir: Callable[..., Path],
    tmp_path: Path,
) -> None:
    base = own_checkpoint("llama", "nf4", **SHORT["llama"])
    _quantize_again(base, checkpoint_dir("llama", **SHORT["llama"]), _PROJECTIONS + layer, blocksize, kind)
    result = export_onnx(base, {"a": adapter_dir("llama")}, output=tmp_path / "out", merge=False, **options)
    assert result.report is not None
    assert result.report.passed
    assert result.report.codes is not None
    assert result.report.codes.exact == (options != {"precision": "int8"})
    assert verify(tmp_path / "out").passed
    coded = Manifest.load(tmp_path / "out").coded
    assert sum(len(weight.modules) for weight in coded) == 14
    if "precision" not in options:
        (own,) = (weight for weight in coded if _PROJECTIONS + layer in [module.name for module in weight.modules])
        assert (own.scheme, own.blocksize) == (kind, blocksize)


@pytest.mark.parametrize("factor", [1e-8, 1e6])
def test_scales_that_float16_cannot_hold_are_refused_by_name_and_float32_takes_them(
    factor: float, tmp_path: Path
) -> None:
    base = save_tiny("llama", "none", tmp_path / "base", **SHORT["llama"])
    file = next(base.glob("*.safetensors"))
    tensors = load_file(file)
    tensors["model.layers.0.mlp.up_proj.weight"] *= factor
    save_file(tensors, file, metadata={"format": "pt"})
    options = {"merge": False, "quantization": "nf4", "double_quant": False, "verify": False}
    with pytest.raises(InputError, match="does not fit the type") as caught:
        export_onnx(base, output=tmp_path / "out", provider="cuda", compute_dtype="fp16", **options)  # type: ignore[arg-type]
    assert "up_proj" in caught.value.details["tensor"]
    assert not (tmp_path / "out").exists()
    export_onnx(base, output=tmp_path / "out", **options)  # type: ignore[arg-type]


def test_a_report_says_that_scales_are_rounded(checkpoint_dir: CheckpointFactory, tmp_path: Path) -> None:
    base = checkpoint_dir("llama", **SHORT["llama"])
    for dtype, expected in (("fp16", "float16"), ("fp32", "float32")):
        options = {"merge": False, "quantization": "nf4", "compute_dtype": dtype, "overwrite": True}
        report = export_onnx(base, output=tmp_path / "out", **options).report  # type: ignore[arg-type]
        assert report is not None
        assert report.codes is not None
        assert report.codes.scales == expected


@pytest.mark.parametrize("options", [{}, {"expand": True}, {"branch": "pooled"}, {"branch": "fixed"}])
def test_bfloat16_for_cuda_is_checked_without_one(
    options: dict[str, Any], checkpoint_dir: CheckpointFactory, adapter_dir: Callable[..., Path], tmp_path: Path
) -> None:
    base = checkpoint_dir("llama", **SHORT["llama"])
    asked = {"merge": False, "quantization": "nf4", "provider": "cuda", "compute_dtype": "bf16"} | options
    report = export_onnx(base, {"a": adapter_dir("llama")}, output=tmp_path / "out", **asked).report
    if not torch.cuda.is_available():
        assert report is not None
        assert report.passed
        assert report.precision == "bf16 weights"
        assert report.control_failed
