"""A shard cut off anywhere is refused: at every byte of its header, and around every tensor's end."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lora_deploy.checkpoint import Checkpoint
from lora_deploy.errors import CheckpointError
from lora_deploy.inputs.headers import read_header
from tests.conftest import CheckpointFactory
from tests.faults.tally import Tally


def test_a_truncated_shard_is_refused(own_checkpoint: CheckpointFactory, tally: Tally) -> None:
    directory = own_checkpoint("gpt2", max_shard_size=120_000)
    shard: Path = sorted(directory.glob("*.safetensors"))[0]
    content = shard.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    ends = [header + entry.end for entry in read_header(shard, CheckpointError).values()]
    places = {*range(header), *(end + by for end in ends for by in (-1, 0, 1))}
    for place in sorted(places - {len(content)}):
        os.truncate(shard, min(place, len(content)))
        if place > len(content):
            shard.write_bytes(content + b"\0")
        refused = False
        try:
            Checkpoint(directory)
        except CheckpointError as error:
            refused = error.details["file"] == str(shard)
        tally("truncated shard", refused)
        assert refused, place
        if place > len(content):
            continue
        shard.write_bytes(content)
    shard.write_bytes(content)
    Checkpoint(directory)


@pytest.mark.parametrize("name", ["optimizer.pt", "pytorch_model.bin", "model.ckpt"])
def test_a_pickle_beside_the_weights_is_never_opened(name: str, own_checkpoint: CheckpointFactory) -> None:
    directory = own_checkpoint("llama")
    (directory / name).symlink_to("nowhere")  # opening it would fail
    assert "lm_head.weight" in Checkpoint(directory)
