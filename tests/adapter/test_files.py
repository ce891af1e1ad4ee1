"""Adapter directories that are damaged, hostile or not understood, and what is read all the same."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_deploy.adapter import TrainingRecord, read_adapter, save_adapter, write_adapter
from lora_deploy.errors import AdapterError, ConfigError, InputError, OutputError
from lora_deploy.quantization import QuantizationScheme
from tests.conftest import random_adapter, tiny_model

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."
TARGET = "model.layers.0.self_attn.q_proj"
A, B = f"{PREFIX}{TARGET}.lora_A.weight", f"{PREFIX}{TARGET}.lora_B.weight"
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def adapter_dir(tmp_path: Path) -> Path:
    model = tiny_model("llama")
    random_adapter(model, target_modules=["q_proj"])
    save_adapter(model, tmp_path / "adapter")
    return tmp_path / "adapter"


def _edit_tensors(directory: Path, change: Callable[[Tensors], object]) -> None:
    tensors = load_file(directory / WEIGHTS)
    change(tensors)
    save_file(tensors, directory / WEIGHTS)


def _edit_config(directory: Path, **values: Any) -> None:
    config = json.loads((directory / CONFIG).read_text())
    (directory / CONFIG).write_text(json.dumps(config | values))


def _poison(tensors: Tensors, value: float) -> None:
    tensors[B][3, 1] = value


def _add(key: str, *shape: int) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({f"{PREFIX}{key}": torch.ones(shape)})


TENSOR_FAULTS: dict[str, tuple[Callable[[Tensors], object], str]] = {
    "NaN": (lambda t: _poison(t, float("nan")), B),
    "infinity": (lambda t: _poison(t, float("-inf")), B),
    "integers": (lambda t: t.update({B: torch.ones(64, 4, dtype=torch.int8)}), B),
    "A is missing": (lambda t: t.pop(A), TARGET),
    "B is missing": (lambda t: t.pop(B), TARGET),
    "another rank than the config's": (lambda t: t.update({A: torch.ones(5, 64), B: torch.ones(64, 5)}), TARGET),
    "A and B of two ranks": (lambda t: t.update({B: torch.ones(64, 5)}), TARGET),
    "A turned": (lambda t: t.update({A: torch.ones(64, 4)}), TARGET),
    "A with three axes": (lambda t: t.update({A: torch.ones(4, 8, 8)}), TARGET),
    "a name without PEFT's prefix": (lambda t: t.update({"stray.weight": torch.ones(1)}), "stray.weight"),
    "a saved module nobody announced": (_add("lm_head.weight", 131, 64), "lm_head.weight"),
    "a bias nobody announced": (_add(f"{TARGET}.base_layer.bias", 64), f"{TARGET}.bias"),
    "a DoRA magnitude nobody announced": (_add(f"{TARGET}.lora_magnitude_vector", 64), TARGET),
    "a bias of B nobody announced": (_add(f"{TARGET}.lora_B.bias", 64), TARGET),
    "an embedding's A": (_add("model.embed_tokens.lora_embedding_A", 4, 131), "model.embed_tokens"),
    "a trainable token": (_add("model.embed_tokens.token_adapter.trainable_tokens_delta", 1, 64), "model.embed_tokens"),
}


@pytest.mark.parametrize("fault", TENSOR_FAULTS)
def test_a_tensor_that_is_wrong_or_not_understood_is_refused_by_name(fault: str, adapter_dir: Path) -> None:
    change, named = TENSOR_FAULTS[fault]
    _edit_tensors(adapter_dir, change)
    with pytest.raises(AdapterError) as caught:
        read_adapter(adapter_dir)
    assert named in caught.value.details["tensor"]
    assert caught.value.details["file"] == str(adapter_dir / WEIGHTS)
    assert caught.value.exit_code == 3


@pytest.mark.parametrize(("setting", "ending"), [("use_dora", "lora_magnitude_vector"), ("lora_bias", "lora_B.bias")])
def test_a_vector_that_the_configuration_announces_must_be_there_and_as_long_as_the_outputs(
    setting: str, ending: str, adapter_dir: Path
) -> None:
    _edit_config(adapter_dir, **{setting: True})
    with pytest.raises(AdapterError, match="another update than its configuration says"):
        read_adapter(adapter_dir)
    keys = [name.removeprefix("base_model.model.") for name in load_file(adapter_dir / WEIGHTS)]
    for target in [key.removesuffix(".lora_B.weight") for key in keys if "lora_B" in key]:
        _edit_tensors(adapter_dir, _add(f"{target}.{ending}", 63))
    with pytest.raises(AdapterError, match="another length") as caught:
        read_adapter(adapter_dir)
    assert caught.value.details["tensor"].endswith(ending)


def test_dora_and_a_bias_of_b_together_are_refused_as_in_peft(adapter_dir: Path) -> None:
    _edit_config(adapter_dir, use_dora=True, lora_bias=True)
    with pytest.raises(ConfigError, match="do not go together") as caught:
        read_adapter(adapter_dir)
    assert caught.value.details["file"] == str(adapter_dir / CONFIG)


def test_an_adapter_without_any_update_is_refused(adapter_dir: Path) -> None:
    _edit_tensors(adapter_dir, dict.clear)
    with pytest.raises(AdapterError, match="updates nothing"):
        read_adapter(adapter_dir)


def _truncate(file: Path, keep: float) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * keep)])


FILE_FAULTS: dict[str, tuple[Callable[[Path], object], type[InputError], str]] = {
    "no weights": (lambda d: (d / WEIGHTS).unlink(), AdapterError, WEIGHTS),
    "no config": (lambda d: (d / CONFIG).unlink(), ConfigError, CONFIG),
    "empty weights": (lambda d: _truncate(d / WEIGHTS, 0), AdapterError, WEIGHTS),
    "truncated header": (lambda d: _truncate(d / WEIGHTS, 0.01), AdapterError, WEIGHTS),
    "truncated data": (lambda d: _truncate(d / WEIGHTS, 0.9), AdapterError, WEIGHTS),
    "truncated config": (lambda d: _truncate(d / CONFIG, 0.5), ConfigError, CONFIG),
    "a pickle for the weights": (lambda d: (d / WEIGHTS).rename(d / PICKLE), AdapterError, PICKLE),
    "a pickle under the name of safetensors": (lambda d: torch.save({}, d / WEIGHTS), AdapterError, WEIGHTS),
    "weights that are a directory": (lambda d: ((d / WEIGHTS).unlink(), (d / WEIGHTS).mkdir()), AdapterError, WEIGHTS),
}


@pytest.mark.parametrize("fault", FILE_FAULTS)
def test_a_damaged_file_is_refused_by_name(fault: str, adapter_dir: Path) -> None:
    break_it, kind, named = FILE_FAULTS[fault]
    break_it(adapter_dir)
    with pytest.raises(kind) as caught:
        read_adapter(adapter_dir)
    assert Path(caught.value.details["file"]).name == named
    assert caught.value.exit_code == 3


@pytest.mark.parametrize(
    "setting",
    [
        {"target_parameters": ["mlp.weight"]},
        {"alpha_of_tomorrow": 2.0},
    ],
)
def test_a_setting_that_is_not_read_refuses_the_adapter(setting: dict[str, Any], adapter_dir: Path) -> None:
    _edit_config(adapter_dir, **setting)
    with pytest.raises(ConfigError) as caught:
        read_adapter(adapter_dir)
    assert caught.value.details["tensor"] == next(iter(setting))
    assert caught.value.details["file"] == str(adapter_dir / CONFIG)


@pytest.mark.parametrize("path", ["missing", "adapter/adapter_config.json"])
def test_a_path_that_is_no_directory_says_what_belongs_there(path: str, adapter_dir: Path) -> None:
    with pytest.raises(AdapterError, match="adapter_model"):
        read_adapter(adapter_dir.parent / path)


def test_a_pickle_beside_the_safetensors_is_ignored(adapter_dir: Path) -> None:
    (adapter_dir / PICKLE).write_bytes(b"whatever")
    assert TARGET in read_adapter(adapter_dir).updates


@pytest.mark.parametrize("wrapper", ["_orig_mod.", "_fsdp_wrapped_module.", "_orig_mod._fsdp_wrapped_module."])
def test_the_names_that_torch_compile_and_fsdp_leave_are_taken_off(wrapper: str, adapter_dir: Path) -> None:
    expected = read_adapter(adapter_dir)
    tensors = load_file(adapter_dir / WEIGHTS)
    save_file(
        {name.replace("self_attn.", f"self_attn.{wrapper}"): t for name, t in tensors.items()}, adapter_dir / WEIGHTS
    )
    found = read_adapter(adapter_dir)
    assert found.updates.keys() == expected.updates.keys()
    assert torch.equal(found.updates[TARGET].A, expected.updates[TARGET].A)


@pytest.mark.parametrize("key", [f"{PREFIX}{TARGET}.bias", f"{PREFIX}{TARGET}.base_layer.bias"])
def test_biases_are_read_under_the_old_name_and_the_new(key: str, adapter_dir: Path) -> None:
    _edit_config(adapter_dir, bias="lora_only")
    _edit_tensors(adapter_dir, lambda tensors: tensors.update({key: torch.ones(64)}))
    assert read_adapter(adapter_dir).parameters.keys() == {f"{TARGET}.bias"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_narrow_tensors_keep_their_type_and_their_update_is_float32(dtype: torch.dtype, adapter_dir: Path) -> None:
    _edit_tensors(adapter_dir, lambda tensors: tensors.update({name: t.to(dtype) for name, t in tensors.items()}))
    update = read_adapter(adapter_dir).updates[TARGET]
    assert update.A.dtype == update.B.dtype == dtype
    assert update.delta_weight().dtype == torch.float32
    torch.testing.assert_close(update.delta_weight(), 2.5 * update.B.float() @ update.A.float())


def test_an_adapter_that_is_read_and_written_comes_back_bit_for_bit(adapter_dir: Path, tmp_path: Path) -> None:
    write_adapter(read_adapter(adapter_dir), tmp_path / "copy")
    for name in (CONFIG, WEIGHTS):
        assert (tmp_path / "copy" / name).read_bytes() == (adapter_dir / name).read_bytes()
    assert sorted(file.name for file in (tmp_path / "copy").iterdir()) == [CONFIG, WEIGHTS]


@pytest.mark.parametrize(
    "write", [lambda a, d: write_adapter(a, d), lambda _, d: _record().save(d)], ids=["adapter", "record"]
)
def test_what_cannot_be_written_is_an_error_of_the_output(write: Callable[..., None], adapter_dir: Path) -> None:
    blocked = adapter_dir / CONFIG / "inside a file"
    with pytest.raises(OutputError) as caught:
        write(read_adapter(adapter_dir), blocked)
    assert str(blocked) in caught.value.details["file"]
    assert caught.value.exit_code == 5


def _record() -> TrainingRecord:
    return TrainingRecord(
        base_model="someone/base", quantization=QuantizationScheme(method="nf4"), base_sha256="0" * 64
    )


def test_a_training_record_comes_back_as_it_was_and_none_is_none(tmp_path: Path) -> None:
    assert TrainingRecord.load(tmp_path) is None
    _record().save(tmp_path)
    assert TrainingRecord.load(tmp_path) == _record()
    assert [file.name for file in tmp_path.iterdir()] == ["lora_deploy.json"]


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"base_model": 3}', "\xff"])
def test_a_damaged_training_record_is_refused_by_name(text: str, tmp_path: Path) -> None:
    (tmp_path / "lora_deploy.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(AdapterError, match="--quantization") as caught:
        TrainingRecord.load(tmp_path)
    assert caught.value.details["file"] == str(tmp_path / "lora_deploy.json")


def test_adapters_in_folders_of_their_names_are_listed(adapter_dir: Path, tmp_path: Path) -> None:
    """What PEFT writes for adapters that are not named default."""
    place = tmp_path / "several"
    for name in ("second", "first"):
        shutil.copytree(adapter_dir, place / name)
    with pytest.raises(AdapterError, match="in folders of their names") as caught:
        read_adapter(place)
    assert caught.value.details["found"] == "first, second"
    assert caught.value.details["remedy"].endswith(str(place / "first"))
    assert read_adapter(place / "first").updates.keys() == read_adapter(adapter_dir).updates.keys()
