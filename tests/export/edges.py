"""Exports at an edge: a base and an adapter that are changed before, and what the parity gate says of the result."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from lora_deploy.adapter import LoraAdapter, write_adapter
from lora_deploy.export import ExportResult, export_onnx
from tests.conftest import random_adapter, save_tiny, tiny_model
from tests.export.conftest import SHORT

Change = Callable[[LoraAdapter], LoraAdapter]


def export_edge(
    root: Path,
    method: str = "nf4",
    base: dict[str, Any] | None = None,
    change: Change = lambda adapter: adapter,
    mode: dict[str, Any] | None = None,
    damage: Callable[[dict[str, torch.Tensor]], object] = lambda tensors: None,
    **asked: Any,
) -> ExportResult:
    """Export a random adapter of a random base, both changed, with the parity gate and its control."""
    fields = SHORT["llama"] if base is None else base
    directory = save_tiny("llama", "none", root / "base", **fields)
    tensors = load_file(directory / "model.safetensors")
    damage(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    write_adapter(change(random_adapter(tiny_model("llama", **fields), **asked)), root / "adapter")
    how = mode or {"merge": True}
    return export_onnx(directory, root / "adapter", output=root / "out", quantization=method, **how)


def assert_proven(result: ExportResult) -> None:
    """What was trained is what is there, and the base without its adapter fails at the same tolerance."""
    assert result.report is not None
    assert result.report.passed
    assert result.report.control_failed
