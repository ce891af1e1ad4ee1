"""Weights beside a graph: read where their file has two names, refused where it is elsewhere."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from lora_deploy.external import readable


@pytest.fixture
def stored(tmp_path: Path) -> ir.ExternalTensor:
    """Four numbers behind four others, in `export/data`."""
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "data").write_bytes(np.arange(8, dtype=np.float32).tobytes())
    shape = ir.Shape((2, 2))
    return ir.ExternalTensor("data", 16, 16, ir.DataType.FLOAT, shape=shape, name="w", base_dir=tmp_path / "export")


def test_a_file_of_two_names_is_read(stored: ir.ExternalTensor, tmp_path: Path) -> None:
    os.link(tmp_path / "export" / "data", tmp_path / "another")
    with pytest.raises(ValueError, match="hard link"):  # what onnx_ir says: without it there is no use in `readable`
        stored.numpy()
    assert readable(stored).numpy().tolist() == [[4, 5], [6, 7]]
    assert readable(stored).name == "w"


def test_a_link_inside_the_directory_is_followed(stored: ir.ExternalTensor, tmp_path: Path) -> None:
    (tmp_path / "export" / "data").rename(tmp_path / "export" / "weights")
    (tmp_path / "export" / "data").symlink_to("weights")
    assert readable(stored).numpy().tolist() == [[4, 5], [6, 7]]


def test_what_leads_out_is_refused(stored: ir.ExternalTensor, tmp_path: Path) -> None:
    (tmp_path / "export" / "data").rename(tmp_path / "secret")
    (tmp_path / "export" / "data").symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match="outside"):
        readable(stored).numpy()


def test_other_tensors_are_what_they_are() -> None:
    tensor = ir.Tensor(np.ones(3, np.float32))
    assert readable(tensor) is tensor
