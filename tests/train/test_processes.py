"""`accelerate launch` on two processes."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lora_deploy.train import TrainOptions

pytestmark = pytest.mark.slow

# The command, and after it a hash of the adapter that this process ended with.
_RANK = """
import hashlib, os, sys
from pathlib import Path
from lora_deploy.adapter import adapter_of
from lora_deploy.train import loop, trainer
run = loop._run
def spy(made, checkpoint):
    run(made, checkpoint)
    digest = hashlib.sha256()
    for update in adapter_of(made._network).updates.values():
        digest.update(update.A.numpy().tobytes() + update.B.numpy().tobytes())
    Path(os.environ["RANK_DIR"], os.environ["RANK"]).write_text(digest.hexdigest())
loop._run = spy
from lora_deploy.cli import main
main()
"""


def launch(asked: TrainOptions, *more: str, script: Path | None = None) -> list[str]:
    """The command line for two processes.

    `accelerate launch --cpu` starts only one process without MPI; --multi_gpu stands for torch's launcher, and the
    processes find no GPU.
    """
    start = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    start += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    start += [str(script)] if script else ["-m", "lora_deploy"]
    start += ["train", "--model", asked.model, "--data", str(asked.data), "--output", str(asked.output)]
    start += ["--batch-size", "1", "--gradient-accumulation", "2", "--dropout", "0.2", "--learning-rate", "0.01"]
    return [*start, "--rank", "4", "--device", "cpu", *more]


def test_two_processes_end_with_one_adapter(options: Callable[..., TrainOptions], tmp_path: Path) -> None:
    script = tmp_path / "rank.py"
    script.write_text(_RANK)
    ranks = tmp_path / "ranks"
    ranks.mkdir()
    asked = options()
    command = launch(asked, "--max-steps", "8", "--eval-fraction", "0.3", "--json", script=script)
    environment = os.environ | {"RANK_DIR": str(ranks)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == 8  # One process prints: two objects would not parse.
    hashes = {path.name: path.read_text() for path in ranks.iterdir()}
    assert set(hashes) == {"0", "1"}
    assert hashes["0"] == hashes["1"] != hashlib.sha256().hexdigest()
    lines = [json.loads(line) for line in (asked.output / "training_log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 8
    assert losses[-1] < 0.7 * losses[0]
    checkpoint = asked.output / "checkpoints" / "checkpoint-8"
    assert {path.name for path in checkpoint.glob("rng_state*")} == {"rng_state_0.pth", "rng_state_1.pth"}


def test_two_processes_are_interrupted_and_resumed(options: Callable[..., TrainOptions], tmp_path: Path) -> None:
    steps = ("--max-steps", "100", "--save-steps", "1000")
    asked = options(output=tmp_path / "broken")
    with subprocess.Popen(launch(asked, *steps), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        log = asked.output / "training_log.jsonl"
        until = time.monotonic() + 120
        while time.monotonic() < until and not (log.exists() and log.read_text().count("\n") > 2):
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=120)
    assert process.returncode != 0
    (checkpoint,) = (asked.output / "checkpoints").iterdir()
    assert 2 <= int(checkpoint.name.rpartition("-")[2]) < 100, err

    straight = options(output=tmp_path / "straight")
    for command in (launch(asked, *steps, "--resume"), launch(straight, *steps)):
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    adapters = [(one.output / "adapter_model.safetensors").read_bytes() for one in (asked, straight)]
    assert adapters[0] == adapters[1]
