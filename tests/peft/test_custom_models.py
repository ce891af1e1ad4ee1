"""PEFT's tests/test_custom_models.py, its LoRA cases on models of torch: PEFT and we adapt the same model.

| here | PEFT's case |
| --- | --- |
| "MLP ..." | "Vanilla MLP 1-14 LoRA", "... with DoRA", "... lora_b bias" |
| "Conv1D ..." | "Embedding + transformers Conv1D 1 LoRA", "... 1 DoRA" |
| "ModelEmbConv1D ..." | `ModelEmbConv1D`, "... trainable_tokens" without its tokens |
| "Deep ...", "Wrapped ..." | `DeepMLP`, `ModelMlpWithLists` |
| "Shared ..." | "MLP 2 layers used more than once" |
| the refused ones | "Conv1d", "Conv2d", "Conv3d", "MHA 1-5 LoRA" |

LoRA on embeddings has tests of its own.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lora_deploy.adapter import apply_adapter, load_adapter, read_adapter, save_adapter
from lora_deploy.config import LoraConfig
from lora_deploy.errors import ConfigError
from lora_deploy.layers import get_lora_model, lora_layers, merge_adapter, unmerge_adapter
from tests.conftest import QUIET_PEFT
from tests.peft.models import copied, inputs, model, move, our_parameters, their_parameters, theirs_and_ours

pytestmark = QUIET_PEFT

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "MLP 1: one layer by a string": ("MLP", {"target_modules": "lin0"}),
    "MLP 2: one layer in a list": ("MLP", {"target_modules": ["lin0"]}),
    "MLP 3: the other layer": ("MLP", {"target_modules": ["lin1"]}),
    "MLP 4: both layers": ("MLP", {"target_modules": ["lin0", "lin1"]}),
    "MLP 5: and the norm whole": ("MLP", {"target_modules": ["lin0"], "modules_to_save": ["norm"]}),
    "MLP 5b: and the other layer whole": ("MLP", {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}),
    "MLP 6: a larger rank": ("MLP", {"target_modules": ["lin0"], "r": 9}),
    "MLP 7: an alpha": ("MLP", {"target_modules": ["lin0"], "lora_alpha": 4}),
    "MLP 8: a regular expression": ("MLP", {"target_modules": r"lin\d"}),
    "MLP 9: all-linear": ("MLP", {"target_modules": "all-linear"}),
    "MLP 10: rank 1": ("MLP", {"target_modules": ["lin0", "lin1"], "r": 1}),
    "MLP 11: a rank that is larger than the layer": ("MLP", {"target_modules": ["lin1"], "r": 32}),
    "MLP: rslora": ("MLP", {"target_modules": ["lin0", "lin1"], "use_rslora": True}),
    "MLP: ranks": ("MLP", {"target_modules": ["lin0", "lin1"], "rank_pattern": {"lin0": 2}}),
    "MLP: alphas": ("MLP", {"target_modules": ["lin0", "lin1"], "alpha_pattern": {"lin1": 3}}),
    "MLP: bias all": ("MLP", {"target_modules": ["lin0"], "bias": "all"}),
    "MLP: bias lora_only": ("MLP", {"target_modules": ["lin0"], "bias": "lora_only"}),
    "MLP: bias all and a norm": ("MLP", {"target_modules": ["lin0"], "bias": "all", "modules_to_save": ["norm"]}),
    "MLP: a bias of B": ("MLP", {"target_modules": ["lin0", "lin1"], "lora_bias": True}),
    "MLP 1 with DoRA": ("MLP", {"target_modules": ["lin0"], "use_dora": True}),
    "MLP 4 with DoRA": ("MLP", {"target_modules": ["lin0", "lin1"], "use_dora": True}),
    "MLP 5 with DoRA": ("MLP", {"target_modules": ["lin0"], "use_dora": True, "modules_to_save": ["lin1"]}),
    "MLP 6 with DoRA": ("MLP", {"target_modules": ["lin0"], "use_dora": True, "r": 9, "use_rslora": True}),
    "MLP with DoRA and biases": ("MLP", {"target_modules": ["lin0"], "use_dora": True, "bias": "lora_only"}),
    "Conv1D 1": ("EmbConv1D", {"target_modules": ["conv1d"]}),
    "Conv1D and linear": ("EmbConv1D", {"target_modules": ["conv1d", "lin0"]}),
    "Conv1D, the field as PEFT sets it": ("EmbConv1D", {"target_modules": ["conv1d"], "fan_in_fan_out": True}),
    "Conv1D 1 with DoRA": ("EmbConv1D", {"target_modules": ["conv1d"], "use_dora": True}),
    "Conv1D, a bias of B": ("EmbConv1D", {"target_modules": ["conv1d"], "lora_bias": True}),
    "Conv1D, bias lora_only": ("EmbConv1D", {"target_modules": ["conv1d"], "bias": "lora_only"}),
    "Conv1D and the embedding whole": ("EmbConv1D", {"target_modules": ["conv1d"], "modules_to_save": ["emb"]}),
    "ModelEmbConv1D all-linear": ("ModelEmbConv1D", {"target_modules": "all-linear"}),
    "ModelEmbConv1D with a head": ("ModelEmbConv1D", {"target_modules": ["conv1d"], "modules_to_save": ["head"]}),
    "Deep all-linear": ("Deep", {"target_modules": "all-linear"}),
    "Deep without the experts": ("Deep", {"target_modules": "all-linear", "exclude_modules": r".*experts.*"}),
    "Deep, a name that is the end of another": ("Deep", {"target_modules": ["lin"]}),
    "Wrapped, one layer": ("Wrapped", {"target_modules": ["lin", "up"], "layers_to_transform": 1}),
    "Wrapped with DoRA": ("Wrapped", {"target_modules": ["my_lin", "head"], "use_dora": True}),
    "Shared": ("Shared", {"target_modules": ["lin"]}),
    "Shared with DoRA": ("Shared", {"target_modules": ["lin"], "use_dora": True}),
}
EXACT = {"rtol": 1e-5, "atol": 1e-5}
DTYPES = {"bfloat16": (torch.bfloat16, 4e-2), "float16": (torch.float16, 5e-3)}


def _moved(case: str) -> tuple[nn.Module, nn.Module, torch.Tensor]:
    """Both trained to the same numbers, and what the base gives."""
    kind, config = CASES[case]
    theirs, ours = theirs_and_ours(kind, config)
    move(theirs)
    copied(theirs, ours)
    return theirs, ours, model(kind)(inputs())


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_are_pefts(case: str) -> None:
    theirs, ours, base = _moved(case)
    expected, found = theirs(inputs()), ours(inputs())
    assert (expected - base).abs().max() > 0.05
    torch.testing.assert_close(found, expected, **EXACT)
    expected.square().sum().backward()
    found.square().sum().backward()
    for name, parameter in their_parameters(theirs).items():
        assert parameter.grad is not None
        # Of the largest: those of "Deep" reach 1e8, and what cancels is rounded in another order (PEFT's own elements
        # are off by up to 3e-3 of their size there, against float64).
        atol = max(1e-4, 1e-5 * float(parameter.grad.abs().max()))
        torch.testing.assert_close(our_parameters(ours)[name].grad, parameter.grad, rtol=1e-4, atol=atol)


@pytest.mark.parametrize("case", CASES)
def test_an_untrained_adapter_is_the_base_and_a_training_step_is_pefts(case: str) -> None:
    kind, config = CASES[case]
    theirs, ours = theirs_and_ours(kind, config)
    torch.testing.assert_close(ours(inputs()), model(kind)(inputs()), **EXACT)
    copied(theirs, ours)
    for trained, parameters in ((theirs, their_parameters(theirs)), (ours, our_parameters(ours))):
        optimizer = torch.optim.SGD(parameters.values(), lr=0.02)
        for _ in range(2):
            optimizer.zero_grad()
            trained(inputs()).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(ours(inputs()), theirs(inputs()), rtol=1e-4, atol=1e-4)
    assert (ours(inputs()) - model(kind)(inputs())).abs().max() > 1e-4


@pytest.mark.parametrize("case", CASES)
def test_merging_keeps_the_outputs_and_unmerging_brings_the_base_back(case: str) -> None:
    theirs, ours, _ = _moved(case)
    expected = theirs(inputs())
    weights = {name: layer.weight.detach().clone() for name, layer in lora_layers(ours).items()}
    merge_adapter(ours)
    torch.testing.assert_close(ours(inputs()), expected, rtol=1e-4, atol=1e-4)
    theirs.merge_adapter()
    torch.testing.assert_close(ours(inputs()), theirs(inputs()), rtol=1e-4, atol=1e-4)
    unmerge_adapter(ours)
    torch.testing.assert_close(ours(inputs()), expected, **EXACT)
    assert all(torch.equal(layer.weight, weights[name]) for name, layer in lora_layers(ours).items())


@pytest.mark.parametrize("case", [case for case, (_, c) in CASES.items() if not c.keys() & {"bias", "modules_to_save"}])
def test_an_adapter_that_is_off_is_the_base(case: str) -> None:
    theirs, ours, base = _moved(case)
    for layer in lora_layers(ours).values():
        layer.active = False
    assert torch.equal(ours(inputs()), base)
    with theirs.disable_adapter():
        assert torch.equal(theirs(inputs()), base)


@pytest.mark.parametrize("case", CASES)
def test_files_go_both_ways(case: str, tmp_path: Path) -> None:
    theirs, ours, base = _moved(case)
    kind = CASES[case][0]
    theirs.save_pretrained(tmp_path / "theirs")
    save_adapter(ours, tmp_path / "ours")
    read = load_adapter(model(kind), tmp_path / "theirs").train()
    back = peft.PeftModel.from_pretrained(model(kind), tmp_path / "ours").train()
    files = [load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs")]
    # PEFT repeats the biases of a module that is trained whole.
    again = (".modules_to_save.bias", ".original_module.bias")
    assert files[0].keys() == {key for key in files[1] if not key.endswith(again)}
    for found in (read, back):
        torch.testing.assert_close(found(inputs()), theirs(inputs()), **EXACT)
    assert (read(inputs()) - base).abs().max() > 0.05


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ["MLP 4: both layers", "MLP 4 with DoRA", "MLP: a bias of B", "Shared"])
def test_the_base_may_be_of_half_precision(case: str, dtype: str) -> None:
    kind, config = CASES[case]
    narrow, tolerance = DTYPES[dtype]
    theirs, ours = theirs_and_ours(kind, config, narrow)
    move(theirs)
    copied(theirs, ours)
    assert {parameter.dtype for parameter in our_parameters(ours).values()} == {torch.float32}
    expected, found = theirs(inputs(narrow)), ours(inputs(narrow))
    assert found.dtype == expected.dtype == narrow
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())
    assert (expected - model(kind, narrow)(inputs(narrow))).abs().max() > 4 * tolerance


@pytest.mark.parametrize("use_dora", [False, True])
def test_dropout_is_pefts_while_training_and_nothing_while_evaluating(use_dora: bool) -> None:
    config = {"target_modules": ["lin0"], "lora_dropout": 0.5, "use_dora": use_dora}
    theirs, ours = theirs_and_ours("MLP", config)
    move(theirs)
    copied(theirs, ours)
    outputs = []
    for trained in (theirs, ours):
        torch.manual_seed(1)
        outputs.append(trained(inputs()))
    torch.testing.assert_close(outputs[1], outputs[0], **EXACT)
    torch.testing.assert_close(ours.eval()(inputs()), theirs.eval()(inputs()), **EXACT)
    assert (ours(inputs()) - outputs[1]).abs().max() > 0.05


def test_an_adapter_takes_the_place_of_another(tmp_path: Path) -> None:
    config = {"target_modules": ["lin0", "lin1"]}
    first, _ = theirs_and_ours("MLP", config)
    move(first, 0.1).save_pretrained(tmp_path / "first")
    second = move(copy.deepcopy(first), 0.4)
    second.save_pretrained(tmp_path / "second")
    ours = load_adapter(model("MLP"), tmp_path / "first")
    torch.testing.assert_close(ours(inputs()), first(inputs()), **EXACT)
    apply_adapter(ours, read_adapter(tmp_path / "second"))
    torch.testing.assert_close(ours(inputs()), second(inputs()), **EXACT)
    assert (first(inputs()) - second(inputs())).abs().max() > 0.05


class _Others(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(3, 4, 2)
        self.conv2 = nn.Conv2d(3, 4, 2)
        self.conv3 = nn.Conv3d(3, 4, 2)
        self.attention = nn.MultiheadAttention(8, 2)
        self.norm = nn.LayerNorm(8)
        self.lin0 = nn.Linear(8, 8)


@pytest.mark.parametrize(
    ("targets", "named"),
    [
        (["conv1"], "conv1"),
        (["conv2"], "conv2"),
        (["conv3"], "conv3"),
        (["conv2", "lin0"], "conv2"),
        (["attention"], "attention"),
        (["attention", "lin0"], "attention"),
        (["out_proj"], "attention.out_proj"),
        ("all-linear", "attention.out_proj"),
        (["norm"], "norm"),
    ],
)
def test_a_layer_that_gets_no_adapter_here_is_refused_by_name(targets: Any, named: str) -> None:
    others = _Others()
    with pytest.raises(ConfigError) as caught:
        get_lora_model(others, LoraConfig(target_modules=targets))
    assert caught.value.details["tensor"] == named
    assert caught.value.exit_code == 3
    assert not lora_layers(others)


def test_all_linear_layers_but_those_of_attention_are_adapted_when_these_are_excluded() -> None:
    ours = get_lora_model(_Others(), LoraConfig(exclude_modules=["attention.out_proj"]))
    assert list(lora_layers(ours)) == ["lin0"]
