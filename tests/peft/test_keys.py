"""Keys that older versions of PEFT, wrappers and hand-made files hold."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lora_deploy.adapter import load_adapter, read_adapter
from lora_deploy.errors import AdapterError
from tests.peft.models import PREFIX, inputs, model, trained_by_peft

Tensors = dict[str, torch.Tensor]
WEIGHTS = "adapter_model.safetensors"
FULL = {"target_modules": ["lin0"], "modules_to_save": ["lin1"], "use_dora": True, "bias": "lora_only"}


def _state_of(theirs: nn.Module) -> Tensors:
    """What is trained, by the names in the model itself."""
    return {name: values.detach().clone() for name, values in theirs.named_parameters() if values.requires_grad}


def _named(name: str) -> Callable[[nn.Module, Tensors], Tensors]:
    return lambda theirs, _: {key.replace(".default", f".{name}"): values for key, values in _state_of(theirs).items()}


def _keys(change: Callable[[str], str]) -> Callable[[nn.Module, Tensors], Tensors]:
    return lambda _, saved: {change(key): values for key, values in saved.items()}


FORMS: dict[str, Callable[[nn.Module, Tensors], Tensors]] = {
    "as PEFT saves it": _keys(str),
    "the state of the model": _named("default"),
    "a name of its own": _named("my-adapter_2"),
    "no prefix": _keys(lambda key: key.removeprefix(PREFIX)),
    "the prefix twice": _keys(lambda key: PREFIX + key),
    "no prefix and a name": lambda t, s: {key.removeprefix(PREFIX): v for key, v in _named("x")(t, s).items()},
    "compiled": _keys(lambda key: "_orig_mod." + key),
    "compiled inside": _keys(lambda key: key.replace(PREFIX, PREFIX + "_orig_mod.")),
    "FSDP": _keys(lambda key: "_fsdp_wrapped_module." + key.replace("lin0.", "lin0._fsdp_wrapped_module.")),
    "checkpointed": _keys(lambda key: key.replace("lin0.", "_checkpoint_wrapped_module.lin0.")),
    "magnitudes as a module": _keys(lambda key: key.replace("magnitude_vector", "magnitude_vector.weight")),
    "magnitudes by name": _keys(lambda key: key.replace("magnitude_vector", "magnitude_vector.default")),
    "biases of older versions": _keys(lambda key: key.replace(".base_layer.bias", ".bias")),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_file_with_other_keys_is_the_same_adapter(form: str, tmp_path: Path) -> None:
    theirs = trained_by_peft("MLP", FULL, tmp_path)
    saved = load_file(tmp_path / WEIGHTS)
    changed = FORMS[form](theirs, saved)
    assert (changed.keys() == saved.keys()) == (form == "as PEFT saves it")
    save_file(changed, tmp_path / WEIGHTS)
    ours = load_adapter(model("MLP"), tmp_path)
    torch.testing.assert_close(ours(inputs()), theirs(inputs()))
    assert (ours(inputs()) - model("MLP")(inputs())).abs().max() > 0.05


@pytest.mark.parametrize("lazy", [False, True])
def test_a_file_with_two_adapters_is_refused_with_their_names(lazy: bool, tmp_path: Path) -> None:
    theirs = trained_by_peft("MLP", FULL, tmp_path)
    state = _state_of(theirs)
    second = {key.replace(".default", ".second"): values.clone() for key, values in state.items() if "lora" in key}
    save_file(state | second, tmp_path / WEIGHTS)
    with pytest.raises(AdapterError, match="more than one adapter") as caught:
        read_adapter(tmp_path, lazy=lazy)
    assert caught.value.details["found"] == "default, second"
    assert "lora_A.second" in caught.value.details["tensor"]
    assert caught.value.exit_code == 3


TWICE: dict[str, Callable[[str], str]] = {
    "with and without a name": lambda key: key.replace("lora_A.", "lora_A.default."),
    "a bias in both forms": lambda key: key.replace(".base_layer.bias", ".bias"),
    "wrapped and not": lambda key: key.replace("lin1.", "lin1._orig_mod."),
}


@pytest.mark.parametrize("form", TWICE)
def test_two_tensors_for_one_place_are_refused(form: str, tmp_path: Path) -> None:
    trained_by_peft("MLP", FULL, tmp_path)
    saved = load_file(tmp_path / WEIGHTS)
    save_file(saved | {TWICE[form](key): values.clone() for key, values in saved.items()}, tmp_path / WEIGHTS)
    with pytest.raises(AdapterError, match="same place"):
        read_adapter(tmp_path)


def test_a_prefix_here_and_none_there_is_refused(tmp_path: Path) -> None:
    trained_by_peft("MLP", FULL, tmp_path)
    saved = load_file(tmp_path / WEIGHTS)
    save_file(
        {key.removeprefix(PREFIX) if "lin1.weight" in key else key: v for key, v in saved.items()}, tmp_path / WEIGHTS
    )
    with pytest.raises(AdapterError, match="does not give") as caught:
        read_adapter(tmp_path)
    assert caught.value.details["tensor"] == "lin1.weight"


def test_the_biases_that_peft_repeats_are_read_once(tmp_path: Path) -> None:
    config = {"target_modules": ["lin0"], "bias": "all", "modules_to_save": ["norm"]}
    theirs = trained_by_peft("MLP", config, tmp_path)
    keys = load_file(tmp_path / WEIGHTS).keys()
    assert {f"{PREFIX}norm.modules_to_save.bias", f"{PREFIX}norm.original_module.bias"} < keys
    assert set(read_adapter(tmp_path).parameters) == {"lin0.bias", "lin1.bias", "norm.bias", "norm.weight"}
    torch.testing.assert_close(load_adapter(model("MLP"), tmp_path)(inputs()), theirs(inputs()))
