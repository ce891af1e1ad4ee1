"""Every class of error through the command line: its code, one message with all that helps, the same bytes each time.

Sets of strings are walked in another order by the second process: a message must not depend on it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_deploy import errors
from lora_deploy.adapter import write_adapter
from tests.commands import tree
from tests.conftest import random_adapter, save_tiny, tiny_model
from tests.faults.forks import Ended, Faulty
from tests.faults.tally import Tally
from tests.train.conftest import calls, char_tokenizer, write_jsonl

KIND = "user error"
ALL = ["file", "tensor", "found", "expected", "remedy"]
Q_PROJ = "model.layers.0.self_attn.q_proj"
A = f"base_model.model.{Q_PROJ}.lora_A.weight"


class Place:
    """Good input, and an export made of it.

    Args:
        root: An empty directory.
        base: To copy.
        faulty: Makes the export.
    """

    def __init__(self, root: Path, base: Path, faulty: Faulty) -> None:
        self.root, self.base, self.adapter, self.out = root, root / "base", root / "adapter", root / "out"
        self.exported = root / "export"
        shutil.copytree(base, self.base)
        write_adapter(random_adapter(tiny_model("llama")), self.adapter)
        self.data = write_jsonl(root / "data.jsonl", calls())
        ended = faulty.run(*self.export("--output", self.exported, "--no-verify"))
        assert ended.code == 0, ended.err

    def export(self, *more: object) -> list[object]:
        """A good export; later arguments win."""
        asked: list[object] = ["export", "--model", self.base, "--adapter", self.adapter, "--output", self.out]
        return [*asked, "--merge", "--quantization", "nf4", "--quiet", *more]

    def train(self, *more: object) -> list[object]:
        """A good training run."""
        asked: list[object] = ["train", "--model", self.base, "--data", self.data, "--output", self.out]
        return [*asked, "--max-steps", "3", "--rank", "4", "--device", "cpu", "--quiet", *more]


Command = list[object]


def _of_usage(place: Place) -> Command:
    return place.export("--precision", "fp64")


def _of_divergence(place: Place) -> Command:
    return place.train("--learning-rate", "1e20", "--max-steps", "5")


def _of_input(place: Place) -> Command:
    other = save_tiny("llama", "none", place.root / "other", seed=9)
    char_tokenizer().save_pretrained(other)
    return ["verify", place.exported, "--model", other, "--adapter", place.adapter, "--quiet"]


def _of_config(place: Place) -> Command:
    file = place.adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"alpha_of_tomorrow": 2}))
    return place.export()


def _change(file: Path, name: str, values: Callable[[torch.Tensor], torch.Tensor]) -> None:
    tensors = load_file(file)
    tensors[name] = values(tensors[name]).contiguous()
    save_file(tensors, file, metadata={"format": "pt"})


def _of_checkpoint(place: Place) -> Command:
    _change(place.base / "model.safetensors", f"{Q_PROJ}.weight", lambda weight: weight[:, :32])
    return place.export()


def _of_adapter(place: Place) -> Command:
    _change(place.adapter / "adapter_model.safetensors", A, lambda half: half[:, :32])
    return place.export()


def _of_data(place: Place) -> Command:
    lines = place.data.read_text().splitlines()
    place.data.write_text("\n".join([*lines[:3], "{half a rec", *lines[3:]]))
    return place.train()


def _of_parity(place: Place) -> Command:
    """An adapter that changes nothing proves nothing."""
    file = place.adapter / "adapter_model.safetensors"
    tensors = {name: values * ("lora_A" in name) for name, values in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    return place.export()


def _of_output(place: Place) -> Command:
    return place.export("--output", place.exported)


class Case(NamedTuple):
    """How an error is made to happen, its code, the labels its message must have, and words in it."""

    make: Callable[[Place], Command]
    code: int
    details: list[str]
    words: list[str]


CASES = {
    "UsageError": Case(_of_usage, 2, ["found", "expected"], ["fp64", "fp32"]),
    "DivergenceError": Case(_of_divergence, 2, ["found", "remedy"], ["not finite after step", "--learning-rate"]),
    "InputError": Case(_of_input, 3, ["file", "found", "expected", "remedy"], ["not the base", "sha256", "--model"]),
    "ConfigError": Case(_of_config, 3, ["file", "tensor", "found"], ["adapter_config.json", "alpha_of_tomorrow"]),
    "CheckpointError": Case(
        _of_checkpoint, 3, ["file", "tensor", "found", "expected"], ["model.safetensors", Q_PROJ, "(64, 32)"]
    ),
    "AdapterError": Case(_of_adapter, 3, ["file", "tensor", "found", "expected"], [Q_PROJ, "32", "64"]),
    "DataError": Case(_of_data, 3, ["file", "found"], ["data.jsonl", "4"]),
    "ParityError": Case(_of_parity, 4, ["file", "found", "remedy"], ["proves nothing", "--no-verify"]),
    "OutputError": Case(_of_output, 5, ["file", "found", "expected", "remedy"], ["the output exists", "--overwrite"]),
}


def test_every_class_has_a_case() -> None:
    assert set(CASES) == set(errors.__all__) - {"LoraDeployError"}
    assert all(CASES[name].code == getattr(errors, name).exit_code for name in CASES)


def _assert_one_message(ended: Ended, name: str) -> None:
    case = CASES[name]
    assert (ended.code, ended.raised, ended.out) == (case.code, name, "")
    first, *rest = ended.err.splitlines()
    assert first.startswith("lora-deploy: ")
    assert ended.err.count("lora-deploy: ") == 1
    assert "Traceback" not in ended.err
    assert sorted(case.details) == sorted(set(case.details) & set(ended.details)), ended.err
    labels = [line.split(":")[0].strip() for line in rest if line.startswith("  ") and line[2:3].strip()]
    assert [label for label in labels if label in ALL] == [label for label in ALL if label in ended.details]
    for word in case.words:
        assert word in ended.err


@pytest.mark.parametrize("name", CASES)
def test_an_error_is_one_message_and_the_same_bytes(
    name: str,
    tiny_base: Callable[..., str],
    faulty: Faulty,
    otherwise_hashed: Faulty,
    tmp_path: Path,
    tally: Tally,
) -> None:
    root = tmp_path / "place"
    root.mkdir()
    place = Place(root, Path(tiny_base()), faulty)
    command = CASES[name].make(place)
    before, ended = tree(root), []
    for server in (faulty, otherwise_hashed):
        ended.append(server.run(*command))
        if name == "DivergenceError":  # it has trained: what it leaves is a run without an adapter
            assert not (place.out / "adapter_model.safetensors").exists()
            shutil.rmtree(place.out)
    same, untouched = ended[0] == ended[1], tree(root) == before
    tally(KIND, same and untouched and (ended[0].code, ended[0].raised) == (CASES[name].code, name))
    _assert_one_message(ended[0], name)
    assert ended[0].err == ended[1].err
    assert untouched
