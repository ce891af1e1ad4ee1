"""Exports of tiny models, made once a session."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from lora_deploy.adapter import write_adapter
from lora_deploy.export import ExportResult, export_onnx
from tests.conftest import CheckpointFactory, random_adapter, tiny_model

ExportFactory = Callable[..., tuple[Path, Path, ExportResult]]


@pytest.fixture(scope="session")
def adapter_dir(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`adapter_dir(family, **random_adapter's options)`: a saved random adapter."""
    made: dict[object, Path] = {}

    def make(family: str, **options: object) -> Path:
        key = (family, *sorted((name, str(value)) for name, value in options.items()))
        if key not in made:
            made[key] = tmp_path_factory.mktemp(f"{family}-adapter")
            write_adapter(random_adapter(tiny_model(family), **options), made[key])  # type: ignore[arg-type]
        return made[key]

    return make


@pytest.fixture(scope="session")
def tiny_export(
    checkpoint_dir: CheckpointFactory, adapter_dir: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> ExportFactory:
    """`tiny_export(family, method, **export_onnx's options)`: (base, adapter, result) of a merged export, made once."""
    made: dict[object, tuple[Path, Path, ExportResult]] = {}

    def make(family: str = "llama", method: str = "nf4", **options: object) -> tuple[Path, Path, ExportResult]:
        key = (family, method, *sorted(options.items()))
        if key not in made:
            base, adapter = checkpoint_dir(family), adapter_dir(family)
            output = tmp_path_factory.mktemp(f"{family}-{method}-export") / "out"
            result = export_onnx(base, adapter, output=output, quantization=method, **options)  # type: ignore[arg-type]
            made[key] = (base, adapter, result)
        return made[key]

    return make
