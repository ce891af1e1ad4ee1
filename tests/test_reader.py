"""Small tensors share an opening of their file, large ones do not, and a file that changes is read anew."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lora_deploy import reader
from lora_deploy.reader import TensorReader


def _write(file: Path, **tensors: torch.Tensor) -> dict[str, torch.Tensor]:
    save_file(tensors, file)
    return tensors


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that were opened, in order."""
    found: list[Path] = []
    real = reader.safe_open

    def counted(file: Path, **options: Any) -> Any:
        found.append(file)
        return real(file, **options)

    monkeypatch.setattr(reader, "safe_open", counted)
    return found


def test_a_thousand_small_tensors_take_one_opening_and_are_what_was_written(tmp_path: Path, opened: list[Path]) -> None:
    file = tmp_path / "small.safetensors"
    tensors = _write(file, **{f"t{number}": torch.randn(3, number % 5 + 1) for number in range(1000)})
    own = TensorReader()
    found = {name: own.read(file, name, values.numel()) for name, values in tensors.items()}
    assert all(torch.equal(found[name], values) for name, values in tensors.items())
    assert opened == [file]


def test_large_tensors_have_mappings_of_their_own(
    tmp_path: Path, opened: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what small ones share ends after some megabytes."""
    monkeypatch.setattr(reader, "_LARGE", 100)
    monkeypatch.setattr(reader, "_SHARED", 30)
    file = tmp_path / "mixed.safetensors"
    tensors = _write(file, large=torch.randn(101), a=torch.randn(20), b=torch.randn(20), c=torch.randn(20))
    own = TensorReader()
    for name in ("large", "a", "b", "large", "c"):
        assert torch.equal(own.read(file, name, tensors[name].numel()), tensors[name])
    assert len(opened) == 4  # a and b share one, c is beyond


def test_a_file_that_was_replaced_is_opened_anew(tmp_path: Path, opened: list[Path]) -> None:
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    old, new = _write(first, t=torch.zeros(4)), _write(second, t=torch.ones(4))
    own = TensorReader()
    kept = own.read(first, "t", 4)
    assert torch.equal(kept, old["t"])
    assert torch.equal(own.read(second, "t", 4), new["t"])
    second.replace(first)
    assert torch.equal(own.read(first, "t", 4), new["t"])
    assert torch.equal(kept, old["t"])
    assert len(opened) == 3
