"""Bases and adapters with numbers that cannot be, and how their export must end."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from lora_deploy.adapter import write_adapter
from tests.commands import assert_one_message, tree
from tests.conftest import random_adapter, tiny_model
from tests.faults.conftest import Place
from tests.faults.tally import Tally

NAN, INFINITY = float("nan"), float("inf")
MODEL, ADAPTER = "model.safetensors", "adapter_model.safetensors"
Q_PROJ = "model.layers.0.self_attn.q_proj"
DOWN = "model.layers.1.mlp.down_proj"
Tensors = dict[str, torch.Tensor]
MERGE: list[object] = ["--merge"]
FIXED: list[object] = ["--branch", "--fixed"]


def change(file: Path, how: Callable[[Tensors], object]) -> None:
    """Change the tensors of a file."""
    tensors = load_file(file)
    how(tensors)
    save_file({name: values.contiguous() for name, values in tensors.items()}, file, metadata={"format": "pt"})


def put(file: Path, name: str, value: float) -> None:
    """Put one value into the middle of a tensor."""

    def put_one(tensors: Tensors) -> None:
        tensors[name].view(-1)[tensors[name].numel() // 2] = value

    change(file, put_one)


def take_base(place: Place, base: Path) -> Path:
    """Let the place have a copy of another base; returns the file of its weights."""
    shutil.rmtree(place.base)
    shutil.copytree(base, place.base)
    return place.base / MODEL


def take_adapter(place: Place, **asked: Any) -> Path:
    """Let the place have another adapter; returns the file of its weights."""
    shutil.rmtree(place.adapter)
    write_adapter(random_adapter(tiny_model("llama"), **asked), place.adapter)
    return place.adapter / ADAPTER


def assert_refused(
    place: Place, tally: Tally, *named: object, flags: list[object] = MERGE, quantization: str | None = "nf4"
) -> None:
    """The export ends with 3 and one message that names the place and a remedy, and nothing is written."""
    before = tree(place.root)
    asked = ["--model", place.base, "--adapter", place.adapter, "--output", place.output, "--quiet", *flags]
    if quantization is not None:
        asked += ["--quantization", quantization]
    ended = place.command("export", *asked)
    tally("number that is not finite, or does not fit", ended.code == 3 and tree(place.root) == before)
    assert_one_message(ended, 3, "file:", "tensor:", "found:", "expected:", "remedy:", *named)
    assert tree(place.root) == before
