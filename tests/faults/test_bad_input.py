"""Bad input through the command line: exit 2 or 3, one message that names the place, nothing changed on disk."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_deploy.adapter import TrainingRecord
from lora_deploy.quantization import QuantizationScheme
from lora_deploy.quantization.base import TrainingBase
from tests.commands import assert_one_message, tree
from tests.conftest import CheckpointFactory, save_tiny
from tests.faults.conftest import Place

Q_PROJ = "model.layers.0.self_attn.q_proj"
A, B = (f"base_model.model.{Q_PROJ}.lora_{side}.weight" for side in "AB")
MODEL, ADAPTER, CONFIG = "model.safetensors", "adapter_model.safetensors", "adapter_config.json"
Fault = Callable[[Place], object]


def _tensors(file: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def _json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def _truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size * 9 // 10)


def _put(file: Path, name: str, value: float) -> None:
    """Put one value into the middle of a tensor."""
    _tensors(file, lambda tensors: tensors[name].view(-1)[tensors[name].numel() // 2].fill_(value))


def _lose_a_shard(place: Place) -> None:
    shutil.rmtree(place.base)
    save_tiny("llama", "none", place.base, max_shard_size="20KB")
    sorted(place.base.glob("model-*.safetensors"))[1].unlink()


def _pickle(directory: Path, safe: str, name: str) -> None:
    (directory / safe).unlink()
    torch.save({}, directory / name)


def _of_another_width(place: Place) -> None:
    shutil.rmtree(place.base)
    save_tiny("llama", "none", place.base, hidden_size=32, head_dim=8)


def _of_more_layers(place: Place) -> None:
    shutil.rmtree(place.base)
    save_tiny("llama", "none", place.base, num_hidden_layers=1)


def _rename_layer(tensors: dict[str, torch.Tensor]) -> None:
    for key in (A, B):
        tensors[key.replace("q_proj", "z_proj")] = tensors.pop(key)


def _record(place: Place, **changes: Any) -> None:
    """Leave a training record beside the adapter: of the base as it is, apart from the changes."""
    values = {
        "base_model": "the-base",
        "quantization": QuantizationScheme(method="nf4"),
        "base_sha256": TrainingBase(place.base).sha256(),
    }
    TrainingRecord(**(values | changes)).save(place.adapter)


# What is done, and what the message must name.
FAULTS: dict[str, tuple[Fault, list[str]]] = {
    "no model": (lambda p: shutil.rmtree(p.base), ["not a directory", "base"]),
    "no config.json": (lambda p: (p.base / "config.json").unlink(), ["missing", "config.json"]),
    "config.json that is not JSON": (lambda p: (p.base / "config.json").write_text("{"), ["config.json"]),
    "config.json that is a list": (lambda p: (p.base / "config.json").write_text("[]"), ["config.json", "list"]),
    "an unknown model_type": (lambda p: _json(p.base / "config.json", model_type="nonsense"), ["nonsense"]),
    "truncated weights": (lambda p: _truncate(p.base / MODEL), ["truncated", MODEL]),
    "empty weights": (lambda p: (p.base / MODEL).write_bytes(b""), ["damaged", MODEL]),
    "a missing shard": (_lose_a_shard, ["shard", "model-00002-of-"]),
    "a pickled model": (lambda p: _pickle(p.base, MODEL, "pytorch_model.bin"), ["pickle", "pytorch_model.bin"]),
    "a missing weight": (lambda p: _tensors(p.base / MODEL, lambda t: t.pop(f"{Q_PROJ}.weight")), [Q_PROJ]),
    "a weight of another shape": (
        lambda p: _tensors(p.base / MODEL, lambda t: t.update({f"{Q_PROJ}.weight": torch.ones(64, 32)})),
        [MODEL, Q_PROJ, "(64, 32)", "(64, 64)"],
    ),
    "NaN in the base": (lambda p: _put(p.base / MODEL, f"{Q_PROJ}.weight", float("nan")), ["not finite", Q_PROJ]),
    "infinity in the base": (lambda p: _put(p.base / MODEL, f"{Q_PROJ}.weight", float("inf")), ["not finite", Q_PROJ]),
    "NaN in a norm": (lambda p: _put(p.base / MODEL, "model.norm.weight", float("nan")), ["model.norm.weight"]),
    "no adapter": (lambda p: shutil.rmtree(p.adapter), ["not a directory", "adapter"]),
    "no adapter_config.json": (lambda p: (p.adapter / CONFIG).unlink(), [CONFIG]),
    "adapter_config.json that is not JSON": (lambda p: (p.adapter / CONFIG).write_text("{"), [CONFIG]),
    "no adapter weights": (lambda p: (p.adapter / ADAPTER).unlink(), [ADAPTER]),
    "truncated adapter weights": (lambda p: _truncate(p.adapter / ADAPTER), ["truncated", ADAPTER]),
    "a pickled adapter": (lambda p: _pickle(p.adapter, ADAPTER, "adapter_model.bin"), ["pickle", "adapter_model.bin"]),
    "another rank": (lambda p: _json(p.adapter / CONFIG, r=3), ["rank", ADAPTER, "A (4, ", "(3, in)"]),
    "an update of another shape": (
        lambda p: _tensors(p.adapter / ADAPTER, lambda t: t.update({A: torch.ones(4, 32)})),
        ["shape", Q_PROJ, "(64, 32)", "(64, 64)"],
    ),
    "the adapter of another base": (_of_another_width, ["shape", "model.layers.0", "base"]),
    "the adapter of a longer base": (_of_more_layers, ["does not have", "model.layers.1"]),
    "a layer the base does not have": (
        lambda p: _tensors(p.adapter / ADAPTER, _rename_layer),
        ["does not have", "z_proj", "adapter"],
    ),
    "NaN in A": (lambda p: _put(p.adapter / ADAPTER, A, float("nan")), ["not finite", ADAPTER, A]),
    "infinity in B": (lambda p: _put(p.adapter / ADAPTER, B, float("-inf")), ["not finite", ADAPTER, B]),
    "DoRA without magnitudes": (lambda p: _json(p.adapter / CONFIG, use_dora=True), [ADAPTER, "lora_magnitude_vector"]),
    "an invented setting": (lambda p: _json(p.adapter / CONFIG, alpha_of_tomorrow=2), [CONFIG, "alpha_of_tomorrow"]),
    "a record of another base": (lambda p: _record(p, base_sha256="0" * 64), ["another base", "0000", "adapter"]),
    "a record of another quantization": (
        lambda p: _record(p, quantization=QuantizationScheme(method="fp4")),
        ["another quantization", "nf4", "fp4"],
    ),
    "a damaged record": (lambda p: (p.adapter / "lora_deploy.json").write_text("{"), ["lora_deploy.json"]),
}


def _assert_untouched(place: Place, before: dict[str, tuple[int, str]]) -> None:
    assert tree(place.root) == before


@pytest.mark.parametrize("fault", FAULTS)
def test_bad_input_ends_with_three_and_one_message_and_changes_nothing(fault: str, place: Place) -> None:
    damage, named = FAULTS[fault]
    damage(place)
    before = tree(place.root)
    assert_one_message(place.export(), 3, *named)
    _assert_untouched(place, before)


@pytest.mark.parametrize("fault", ["NaN in the base", "NaN in A", "truncated weights"])
def test_bad_input_leaves_an_older_export_as_it_was(fault: str, place: Place) -> None:
    assert place.export().code == 0
    FAULTS[fault][0](place)
    before = tree(place.root)
    assert_one_message(place.export("--overwrite"), 3, *FAULTS[fault][1])
    _assert_untouched(place, before)


@pytest.mark.parametrize("method", ["none", "fp4", "int8"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_no_quantization_hides_a_number_that_is_not_finite(method: str, value: float, place: Place) -> None:
    _put(place.base / MODEL, f"{Q_PROJ}.weight", value)
    assert_one_message(place.export(quantization=method), 3, "not finite", Q_PROJ, place.base)


@pytest.mark.parametrize("kind", ["t5", "xlnet"])
def test_a_model_that_is_no_causal_one_is_bad_input(kind: str, place: Place) -> None:
    _json(place.base / "config.json", model_type=kind)
    assert_one_message(place.export(), 3, "config.json")


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--precision", "bf16"], ["bf16", "cpu", "fp16"]),
        (["--precision", "fp64"], ["no such precision", "fp64", "fp32"]),
        (["--precision", "FP16"], ["no such precision"]),
        (["--provider", "tpu"], ["no such provider", "tpu", "cuda"]),
        (["--quantization", "q4"], ["no such quantization", "q4", "nf4"]),
        (["--quantization", "auto"], ["not known which base", "adapter", "--quantization nf4"]),
    ],
)
def test_options_that_cannot_be_end_with_two(flags: list[str], named: list[str], place: Place) -> None:
    before = tree(place.root)
    assert_one_message(place.export(*flags), 2, *named)
    _assert_untouched(place, before)


def test_an_export_that_is_not_said_to_be_merged_is_no_guess(place: Place) -> None:
    assert_one_message(place.command("export", "--model", place.base, "--output", place.output), 2, "--merge")


@pytest.mark.parametrize("asked", ["fp4", "int8", "none"])
def test_a_quantized_checkpoint_cannot_be_said_to_be_another(
    asked: str, place: Place, checkpoint_dir: CheckpointFactory
) -> None:
    base = checkpoint_dir("llama", "nf4")
    ended = place.export("--model", base, quantization=asked)
    assert_one_message(ended, 3, "quantized already", base / "config.json", "nf4", asked, "leave --quantization out")
    assert not place.output.exists()


@pytest.mark.parametrize("asked", ["auto", "nf4"])
def test_double_quantization_in_the_record_cannot_be_said_away(asked: str, place: Place) -> None:
    _record(place)
    assert_one_message(place.export("--no-double-quant", quantization=asked), 3, "double quantization")
    assert place.export(quantization=asked).code == 0


def test_a_record_without_double_quantization_wins_over_the_default(place: Place) -> None:
    """The export is the one that --no-double-quant gives, bit for bit."""
    assert place.export("--no-double-quant").code == 0
    _record(place, quantization=QuantizationScheme(method="nf4", double_quant=False))
    other = place.root / "other"
    assert place.export("--output", other).code == 0
    assert [file.name for file in place.output.glob("*.data")] == [file.name for file in other.glob("*.data")]


@pytest.mark.parametrize("name", ["model.norm.weight", "model.embed_tokens.weight"])
def test_a_weight_that_float16_cannot_hold_is_refused_by_name(name: str, place: Place) -> None:
    _put(place.base / MODEL, name, 1e5)
    before = tree(place.root)
    assert_one_message(place.export("--precision", "fp16"), 3, "too large", name, "100000", "65504", "fp32")
    _assert_untouched(place, before)


def test_a_weight_that_int8_cannot_hold_is_refused_by_name(place: Place) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    _put(place.base / MODEL, name, 1e5)
    before = tree(place.root)
    ended = place.export(quantization="int8")
    assert_one_message(ended, 3, "too large for LLM.int8", name, place.base / MODEL, "100000", "65504")
    _assert_untouched(place, before)


def test_the_process_itself_ends_with_three_and_no_traceback(place: Place) -> None:
    """Once for truth: another process, its own stderr and its own exit code."""
    (place.base / "config.json").unlink()
    before = tree(place.root)
    command = [sys.executable, "-m", "lora_deploy", "export", "--merge", "--quiet", "--quantization", "nf4"]
    command += ["--model", str(place.base), "--adapter", str(place.adapter), "--output", str(place.output)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 3
    assert ended.stdout == ""
    assert ended.stderr.splitlines() == [
        "lora-deploy: a file of the model is missing",
        f"  file:     {place.base / 'config.json'}",
        "  remedy:   copy or download the model again",
    ]
    _assert_untouched(place, before)
