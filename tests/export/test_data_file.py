"""The file of weights: its hash is that of its bytes, whatever the parts they come in."""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path

import pytest
import torch

from lora_deploy.export import data_file
from lora_deploy.export.data_file import DataFile


@pytest.mark.parametrize("piece", [1, 7, 64, 1 << 24])
def test_the_hash_is_that_of_the_file(piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_file, "_PIECE", piece)
    monkeypatch.setattr(data_file, "_WRITEBACK", 100)
    values = [torch.randn(5, 3), torch.randn(2).to(torch.bfloat16), torch.arange(9, dtype=torch.uint8), torch.tensor(1)]
    counts: list[int] = []
    starts = []
    with DataFile(tmp_path / "data") as file:
        for tensor in values:
            starts.append(file.align(32))
            assert file.write(tensor, counts.append) == tensor.nbytes
        sha256 = file.finish()
    written = (tmp_path / "data").read_bytes()
    assert hashlib.sha256(written).hexdigest() == sha256
    assert starts == [0, 64, 96, 128]
    assert sum(counts) == sum(tensor.nbytes for tensor in values)
    for start, tensor in zip(starts, values, strict=True):
        assert written[start : start + tensor.nbytes] == bytes(tensor.reshape(-1).view(torch.uint8).tolist())


def test_a_full_disk_is_an_error_and_leaves_no_thread() -> None:
    def fill() -> None:
        with DataFile(Path("/dev/full")) as file:
            file.write(torch.zeros(1 << 16), lambda count: None)
            file.finish()

    with pytest.raises(OSError, match="No space left"):
        fill()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("hash")]
