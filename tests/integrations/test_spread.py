"""`accelerate launch` with the configurations that are shipped, on two processes of a CPU."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from lora_deploy.adapter import read_adapter
from lora_deploy.run import OnnxSession
from tests.conftest import QUIET_PEFT, CheckpointFactory, logits, token_ids

pytestmark = [pytest.mark.slow, *QUIET_PEFT]

CONFIGS = files("lora_deploy") / "integrations" / "accelerate"
DDP = ["--multi_gpu", "--num_machines", "1", "--dynamo_backend", "no"]


def launch(how: list[str], base: Path, directory: Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """Train and export in two processes."""
    directory.mkdir(parents=True, exist_ok=True)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "accelerate.commands.launch", *how, "--num_processes", "2"]
    command += ["--mixed_precision", "no", "--main_process_port", str(port)]
    command += ["-m", "tests.integrations.launched", str(base), str(directory), json.dumps(options)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_TORCH_DEVICE": "cpu"}
    return subprocess.run(command, capture_output=True, text=True, timeout=400, env=environment)


def config(name: str) -> list[str]:
    """The arguments for a shipped configuration."""
    if name == "zero3":
        pytest.importorskip(
            "deepspeed",
            reason="deepspeed is not installed: DS_BUILD_OPS=0 pip install --no-build-isolation deepspeed",
        )
    return DDP if name == "ddp" else ["--config_file", str(CONFIGS / f"{name}.yaml")]


@pytest.fixture(scope="module")
def trained(checkpoint_dir: CheckpointFactory, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`trained(name, storage)`: what two processes left, made once."""
    made: dict[tuple[str, str | None], Path] = {}

    def make(name: str, storage: str | None) -> Path:
        if (name, storage) not in made:
            directory = tmp_path_factory.mktemp(name)
            done = launch(config(name), base_of(checkpoint_dir, storage), directory, storage=storage)
            assert done.returncode == 0, done.stderr
            made[name, storage] = directory
        return made[name, storage]

    return make


def base_of(checkpoint_dir: CheckpointFactory, storage: str | None) -> Path:
    """The checkpoint, in the type that it is loaded in."""
    return checkpoint_dir("llama", dtype=getattr(torch, storage or "float32"))


WHOLE = {None: 64 * 112, "bfloat16": 64 * 112 // 4}  # four codes in a value of bfloat16


@pytest.mark.parametrize("storage", [None, "bfloat16"])
@pytest.mark.parametrize(("name", "here"), [("ddp", 1), ("fsdp2", 1 / 2), ("zero3", 0)])
def test_the_first_of_two_processes_exports_what_both_trained(
    name: str, here: float, storage: str | None, trained: Callable[..., Path], checkpoint_dir: CheckpointFactory
) -> None:
    directory = trained(name, storage)
    ranks = [json.loads((directory / f"rank-{rank}.json").read_text()) for rank in range(2)]
    assert [rank["passed"] for rank in ranks] == [True, None]
    assert [rank["here"] for rank in ranks] == [WHOLE[storage] * here] * 2
    assert (ranks[0]["units"] > 2) == (name == "fsdp2")  # each decoder layer is one
    assert min(rank["ended"] for rank in ranks) >= (directory / "out" / "model.onnx").stat().st_mtime
    record = json.loads((directory / "adapter" / "lora_deploy.json").read_text())
    assert record["quantization"]["method"] == ("nf4" if storage else "none")
    assert (record["codes_sha256"] is not None) == (storage is not None)
    found, expected = (read_adapter(trained(one, storage) / "adapter") for one in (name, "ddp"))
    assert found.updates.keys() == expected.updates.keys()
    tolerance = 0.1 if storage else 1e-3
    for target, update in found.updates.items():
        same = expected.updates[target]
        assert (update.B - same.B).norm() < tolerance * same.B.norm()
        assert (update.A - same.A).norm() < tolerance * same.A.norm()
    if storage is None:  # what PEFT makes of the files that were gathered
        base = AutoModelForCausalLM.from_pretrained(base_of(checkpoint_dir, storage))
        before = logits(base)
        model = peft.PeftModel.from_pretrained(base, str(directory / "adapter"))
        ids = token_ids()
        out, _ = OnnxSession(directory / "out").forward(ids.numpy(), torch.ones_like(ids).numpy())
        assert (torch.from_numpy(out) - logits(model)).abs().max() < 1e-3
        assert (torch.from_numpy(out) - before).abs().max() > 0.1


@pytest.mark.parametrize(
    ("name", "options", "named"),
    [
        ("fsdp2", {"late": True}, "give it there"),
        ("fsdp2", {"layers": "own"}, "the layers of get_lora_model"),
        ("fsdp2", {"options": {"precision": "fp31"}}, "fp31"),
        ("zero3", {"options": {"precision": "fp31"}}, "fp31"),
        ("ddp", {"options": {"precision": "int8", "max_kl": 1e-12}}, "which is whole"),
    ],
)
def test_what_one_process_refuses_ends_them_all(
    name: str, options: dict[str, Any], named: str, checkpoint_dir: CheckpointFactory, tmp_path: Path
) -> None:
    done = launch(config(name), checkpoint_dir("llama"), tmp_path, **options)
    assert done.returncode != 0
    assert named in done.stderr
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "rank-0.json").exists()
    assert (tmp_path / "adapter").exists() == (name == "ddp")
