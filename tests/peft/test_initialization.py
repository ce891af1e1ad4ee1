"""How A and B begin, after `TestLoraInitialization` of PEFT's tests/test_initialization.py.

| here | PEFT's case |
| --- | --- |
| the spread of A and B | `test_lora_linear_init_default`, `..._gaussian`, `test_lora_linear_false` |
| orthogonal | `test_lora_init_orthogonal`, `..._half_precision_dtype`, `..._odd_rank_raises` |
| scalings | `test_lora_scaling_default`, `test_lora_rslora_scaling` |
| DoRA | `test_lora_use_dora_linear`, `..._init_false` |
| a bias of B | `test_lora_with_bias_extra_params`, `..._incompatible_arguments` |
| the base is changed | `test_lora_pissa_conversion_same_output_after_loading`, `test_olora_...` |
| only read | `test_lora_mica_...`; EVA's own tests |
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

from lora_deploy.adapter import load_adapter, read_adapter
from lora_deploy.config import LoraConfig
from lora_deploy.errors import ConfigError
from lora_deploy.layers import get_lora_config, get_lora_model
from tests.peft.models import copied, inputs, model, move, theirs_and_ours

pytestmark = [
    pytest.mark.filterwarnings("ignore:`init_lora_weights` is 'eva' but:UserWarning"),
    pytest.mark.filterwarnings("ignore:lora with eva initialization used with:UserWarning"),
    pytest.mark.filterwarnings("ignore:(PiSSA|OLoRA) changes the base weights:UserWarning"),
]

R, IN, OUT = 16, 500, 400


class _Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(IN, OUT)


def _halves(init: Any, dtype: torch.dtype = torch.float32) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """A and B of PEFT, and ours."""
    config = {"r": R, "target_modules": ["lin"], "init_lora_weights": init}
    theirs = peft.get_peft_model(_Wide().to(dtype), peft.LoraConfig(**config)).base_model.model.lin
    ours = get_lora_model(_Wide().to(dtype), LoraConfig(**config)).lin
    return [
        (theirs.lora_A["default"].weight, theirs.lora_B["default"].weight),
        (ours.lora_A.weight, ours.lora_B.weight),
    ]


@pytest.mark.parametrize("init", [True, False, "gaussian", "Gaussian", "orthogonal"])
def test_the_spread_of_a_and_b_is_pefts(init: Any) -> None:
    (a, b), (our_a, our_b) = _halves(init)
    for theirs, ours in ((a, our_a), (b, our_b)):
        assert ours.mean().item() == pytest.approx(0, abs=0.02)
        assert ours.std().item() == pytest.approx(theirs.std().item(), rel=0.05)
        # Uniform numbers have a sharp end, normal ones a long tail.
        if theirs.any():
            ends = [values.abs().max() / values.std() for values in (ours, theirs)]
            assert ends[0].item() == pytest.approx(ends[1].item(), rel=0.3)
    assert torch.equal(our_b, torch.zeros_like(our_b)) == torch.equal(b, torch.zeros_like(b))


def test_the_spread_is_that_of_the_definition() -> None:
    assert _halves(True)[1][0].abs().max().item() == pytest.approx(IN**-0.5, rel=0.01)
    assert _halves("gaussian")[1][0].std().item() == pytest.approx(1 / R, rel=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_orthogonal_a_and_b_cancel_although_neither_is_zero(dtype: torch.dtype) -> None:
    for a, b in _halves("orthogonal", dtype):
        assert a.abs().max() > 0.01
        assert b.abs().max() > 0.01
        assert a.is_contiguous()
        assert (b.float() @ a.float()).abs().max() < (1e-5 if dtype == torch.float32 else 1e-2)


def test_orthogonal_needs_an_even_rank_in_both() -> None:
    config = {
        "r": 4,
        "target_modules": ["lin0", "lin1"],
        "rank_pattern": {"lin1": 3},
        "init_lora_weights": "orthogonal",
    }
    with pytest.raises(ValueError, match="even"):
        peft.get_peft_model(model("MLP"), peft.LoraConfig(**config))
    with pytest.raises(ConfigError, match="even") as caught:
        get_lora_model(model("MLP"), LoraConfig(**config))
    assert "lin1" in caught.value.details["tensor"]


@pytest.mark.parametrize("init", [True, "gaussian", "orthogonal"])
@pytest.mark.parametrize("use_dora", [False, True])
def test_training_begins_at_the_base(init: Any, use_dora: bool) -> None:
    config = {"target_modules": ["lin0", "lin1"], "init_lora_weights": init, "use_dora": use_dora}
    for adapted in theirs_and_ours("MLP", config):
        torch.testing.assert_close(adapted(inputs()), model("MLP")(inputs()), rtol=1e-4, atol=1e-4)
        assert (move(adapted)(inputs()) - model("MLP")(inputs())).abs().max() > 0.05


def test_false_begins_elsewhere_in_both() -> None:
    for adapted in theirs_and_ours("MLP", {"target_modules": ["lin0"], "init_lora_weights": False}):
        assert (adapted(inputs()) - model("MLP")(inputs())).abs().max() > 0.01


@pytest.mark.parametrize("init", [True, False])
def test_the_magnitudes_begin_as_pefts(init: bool) -> None:
    theirs, ours = theirs_and_ours("MLP", {"target_modules": ["lin0"], "use_dora": True, "init_lora_weights": init})
    found = ours.lin0.lora_magnitude_vector
    if init:
        torch.testing.assert_close(found, theirs.base_model.model.lin0.lora_magnitude_vector["default"].weight)
    weight = ours.lin0.base_layer.weight + ours.lin0.delta_weight()
    torch.testing.assert_close(found, weight.norm(dim=1))
    torch.testing.assert_close(ours(inputs()), _plain(ours)(inputs()))


def _plain(dora: nn.Module) -> nn.Module:
    plain = get_lora_model(model("MLP"), LoraConfig(r=4, lora_alpha=10, target_modules=["lin0"]))
    plain.lin0.load_state_dict(dora.lin0.state_dict(), strict=False)
    return plain


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize(("r", "alpha"), [(1, 1), (4, 10), (3, 2.5), (64, 8)])
def test_the_scaling_is_pefts(use_rslora: bool, r: int, alpha: float) -> None:
    config = {"r": r, "lora_alpha": alpha, "target_modules": ["lin0"], "use_rslora": use_rslora}
    theirs, ours = theirs_and_ours("MLP", config)
    assert ours.lin0.scaling == pytest.approx(theirs.base_model.model.lin0.scaling["default"])


def test_a_bias_of_b_begins_at_zero_and_is_trained() -> None:
    theirs, ours = theirs_and_ours("MLP", {"target_modules": ["lin0"], "lora_bias": True})
    copied(theirs, ours)
    assert not ours.lin0.lora_B.bias.any()
    assert ours.lin0.lora_B.bias.requires_grad


@pytest.mark.parametrize("extra", [{"use_dora": True}, {"init_lora_weights": "gaussian"}, {"init_lora_weights": "eva"}])
def test_what_peft_does_not_take_with_a_bias_of_b_is_refused(extra: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="lora_bias"):
        peft.LoraConfig(target_modules=["lin0"], lora_bias=True, **extra)
    with pytest.raises(ConfigError) as caught:
        LoraConfig(target_modules=["lin0"], lora_bias=True, **extra)
    assert caught.value.details["tensor"] == "lora_bias"


CHANGED = ["pissa", "pissa_niter_4", "olora", "corda", "lora_ga", "loftq"]


@pytest.mark.parametrize("init", CHANGED)
def test_an_initialization_that_changes_the_base_is_refused_with_the_way_to_convert(init: str, tmp_path: Path) -> None:
    _saved(tmp_path, {"target_modules": ["lin0"]})
    _edit(tmp_path, init_lora_weights=init)
    with pytest.raises(ConfigError) as caught:
        read_adapter(tmp_path)
    details = caught.value.details
    assert (details["tensor"], details["found"]) == ("init_lora_weights", init)
    assert "save_pretrained(" in details["remedy"]
    assert "adapter_config.json" in details["file"]


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_the_conversion_that_the_message_names_gives_an_adapter_of_the_base(init: str, tmp_path: Path) -> None:
    base = model("MLP")(inputs())
    config = peft.LoraConfig(r=4, lora_alpha=10, target_modules=["lin0"], init_lora_weights=init)
    theirs = peft.get_peft_model(model("MLP"), config)
    # The base's weights are not what they were, and are not in the file.
    assert not torch.equal(theirs.base_model.model.lin0.base_layer.weight, model("MLP").lin0.weight)
    theirs.peft_config["default"].init_lora_weights = True
    theirs.save_pretrained(tmp_path / "init")
    theirs.peft_config["default"].init_lora_weights = init
    move(theirs)
    expected = theirs(inputs())
    theirs.save_pretrained(tmp_path / "plain")
    with pytest.raises(ConfigError, match=init):
        read_adapter(tmp_path / "plain")
    theirs.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "init"))
    ours = load_adapter(model("MLP"), tmp_path / "converted")
    torch.testing.assert_close(ours(inputs()), expected, rtol=1e-4, atol=1e-4)
    assert (expected - base).abs().max() > 0.05


@pytest.mark.parametrize("init", [True, False, "gaussian", "Gaussian", "orthogonal", "mica", "eva"])
def test_an_initialization_that_leaves_the_base_alone_says_nothing_once_trained(init: Any, tmp_path: Path) -> None:
    theirs = _saved(tmp_path, {"target_modules": ["lin0"], "init_lora_weights": init})
    if init == "eva":  # What EVA needs of its data stays in the file.
        assert json.loads((tmp_path / "adapter_config.json").read_text())["eva_config"]
    ours = load_adapter(model("MLP"), tmp_path)
    assert get_lora_config(ours).init_lora_weights == init
    torch.testing.assert_close(ours(inputs()), theirs(inputs()))
    assert (ours(inputs()) - model("MLP")(inputs())).abs().max() > 0.05


@pytest.mark.parametrize("init", ["eva", "mica"])
def test_an_initialization_that_is_not_built_here_is_not_trained(init: str) -> None:
    with pytest.raises(ConfigError, match="not trained here") as caught:
        get_lora_model(model("MLP"), LoraConfig(target_modules=["lin0"], init_lora_weights=init))
    assert caught.value.details["found"] == init


def test_an_unknown_initialization_is_refused(tmp_path: Path) -> None:
    _saved(tmp_path, {"target_modules": ["lin0"]})
    _edit(tmp_path, init_lora_weights="of_tomorrow")
    with pytest.raises(ConfigError, match="of_tomorrow"):
        read_adapter(tmp_path)


def _saved(directory: Path, config: dict[str, Any]) -> nn.Module:
    """An adapter that PEFT saved, every number moved."""
    theirs = peft.get_peft_model(model("MLP"), peft.LoraConfig(r=4, lora_alpha=10, **config))
    move(theirs).save_pretrained(directory)
    return theirs


def _edit(directory: Path, **values: Any) -> None:
    file = directory / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
