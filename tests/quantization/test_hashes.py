"""Hashing a checkpoint beside other work, and a process that ends meanwhile."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

_ENDS = """
import sys
from pathlib import Path
from lora_deploy.checkpoint import Checkpoint
from lora_deploy.quantization.hashes import CheckpointHash

hashes = CheckpointHash(Checkpoint(Path(sys.argv[1])))
hashes.begin()
if sys.argv[2] == "waits":
    print(hashes.result())
raise SystemExit(3)
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """80 tensors of 16 MB, which are some tenths of a second of work."""
    directory = tmp_path_factory.mktemp("checkpoint")
    (directory / "config.json").write_text("{}")
    save_file({f"w{number:02d}": torch.ones(2048, 2048) for number in range(80)}, directory / "model.safetensors")
    return directory


def _end(checkpoint: Path, how: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", _ENDS, str(checkpoint), how]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_process_ends_as_it_wants_while_a_checkpoint_is_hashed(checkpoint: Path) -> None:
    """Python lets go of threads in the middle of torch's C++, which then aborts: one time in four, without the stop."""
    for _ in range(3):
        ended = _end(checkpoint, "leaves")
        assert (ended.returncode, ended.stdout) == (3, ""), ended.stderr
        assert "terminate" not in ended.stderr


def test_who_waits_has_the_hash(checkpoint: Path) -> None:
    ended = _end(checkpoint, "waits")
    assert ended.returncode == 3, ended.stderr
    assert len(ended.stdout.strip()) == 64
