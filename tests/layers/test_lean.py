"""Whole models that keep less for the backward: the same model, left to autograd, is the judge."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from lora_deploy.config import LoraConfig
from lora_deploy.layers import get_lora_model, lora_layers
from lora_deploy.layers.lean import make_lean
from lora_deploy.layers.recompute import origin_of, remake
from lora_deploy.quantization import quantize_model
from tests.conftest import TINY_FAMILIES, tiny_model, token_ids
from tests.layers.kept import kept_storages


def adapted(family: str, method: str, lean: bool, **config: Any) -> PreTrainedModel:
    """A tiny model in training mode whose adapter does something."""
    model = quantize_model(tiny_model(family), method).train()
    get_lora_model(model, LoraConfig(r=4, lora_alpha=10, **config), lean=lean)
    with torch.no_grad():
        for index, layer in enumerate(lora_layers(model).values()):
            layer.lora_A.weight.copy_(torch.randn(layer.lora_A.weight.shape, generator=_generator(index)) * 0.2)
            layer.lora_B.weight.copy_(torch.randn(layer.lora_B.weight.shape, generator=_generator(-1 - index)) * 0.2)
    return model


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def loss_and_gradients(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    torch.manual_seed(5)
    ids = token_ids()
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    found = {name: one.grad for name, one in model.named_parameters() if one.requires_grad and one.grad is not None}
    return {"loss": loss.detach(), **found}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = 1e-4) -> None:
    assert found.keys() == expected.keys()
    for name, one in expected.items():
        assert (found[name] - one).abs().max() <= tolerance * one.abs().max(), name


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"lora_dropout": 0.3},
        {"target_modules": ["q_proj", "up_proj", "c_attn"]},
        {"target_modules": ["down_proj", "c_proj"], "modules_to_save": ["norm", "ln_f"]},
        {"use_dora": True},
        {"lora_bias": True, "bias": "all"},
    ],
    ids=["all", "dropout", "some", "trained norms", "dora", "biases"],
)
@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_loss_and_gradients_are_those_of_autograd_alone(family: str, config: dict[str, Any]) -> None:
    known = {name for name, _ in tiny_model(family).named_modules()}
    for key in ("target_modules", "modules_to_save"):
        if key in config:
            names = [one for one in config[key] if any(name.rpartition(".")[2] == one for name in known)]
            config = config | {key: names}
    # In float64, but for what a norm does in float32.
    expected = loss_and_gradients(adapted(family, "none", False, **config).double())
    assert len(expected) > 2
    assert_same(loss_and_gradients(adapted(family, "none", True, **config).double()), expected, 1e-6)


@pytest.mark.parametrize("method", ["nf4", "fp4", "int8"])
def test_over_quantized_bases_too(method: str) -> None:
    expected = loss_and_gradients(adapted("qwen2", method, False))
    assert_same(loss_and_gradients(adapted("qwen2", method, True)), expected)
    model = adapted("qwen2", method, True)
    next(iter(lora_layers(model).values())).scaling *= 1.01
    with pytest.raises(AssertionError):
        assert_same(loss_and_gradients(model), expected)


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_under_checkpointing_nothing_changes(family: str) -> None:
    expected = loss_and_gradients(adapted(family, "none", True, lora_dropout=0.3))
    model = adapted(family, "none", True, lora_dropout=0.3)
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    assert_same(loss_and_gradients(model), expected, 0)


@pytest.mark.parametrize(("family", "share"), [("llama", 0.65), ("gpt2", 0.95)])
def test_less_is_kept_than_autograd_would(family: str, share: float) -> None:
    ids = token_ids(4, 32)
    sizes = []
    for lean in (True, False):
        model = adapted(family, "none", lean)
        own = [*model.parameters(), *model.buffers()]
        body = partial(model.base_model, input_ids=ids, use_cache=False)
        sizes.append(sum(kept_storages(body, own).values()))
    assert sizes[0] < share * sizes[1]


def test_a_copy_of_a_lean_model_uses_its_own_weights() -> None:
    model = adapted("llama", "none", True)
    expected = loss_and_gradients(copy.deepcopy(model))
    other = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.data.zero_()
    assert_same(loss_and_gradients(other), expected, 0)


class _Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(6, 8), nn.Linear(6, 8)
        self.down_proj, self.act_fn = nn.Linear(8, 6), nn.SiLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class _OtherWay(_Mlp):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.gate_proj(x) * self.act_fn(self.up_proj(x)))


class _Scaled(_Mlp):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)) * 0.5


class _Extended(_Mlp):
    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.5)


@pytest.mark.parametrize(("kind", "known"), [(_Mlp, True), (_OtherWay, False), (_Scaled, False), (_Extended, False)])
def test_a_gated_mlp_is_known_by_what_it_does(kind: type[nn.Module], known: bool) -> None:
    module = kind().requires_grad_(False)
    x = torch.randn(3, 6, requires_grad=True)
    expected = module(x)
    make_lean(module)
    assert ("forward" in vars(module)) == known
    assert torch.equal(module(x), expected)


@pytest.mark.parametrize(
    ("module", "known"),
    [
        (nn.LayerNorm(6), True),
        (nn.RMSNorm(6), True),
        (nn.Linear(6, 6), False),
        (nn.BatchNorm1d(6), False),
        (nn.ReLU(), False),
    ],
)
def test_a_norm_is_known_by_what_it_is_made_of(module: nn.Module, known: bool) -> None:
    make_lean(module)
    assert ("forward" in vars(module)) == known


def test_a_norm_that_is_trained_later_gets_its_gradient() -> None:
    norm = nn.RMSNorm(6).requires_grad_(False)
    make_lean(norm)
    x = torch.randn(3, 6, requires_grad=True)
    assert origin_of(norm(x)) is not None
    norm.requires_grad_(True)
    norm(x).sum().backward()
    assert norm.weight.grad is not None


def test_a_tensor_that_was_changed_has_no_origin_any_more() -> None:
    x = torch.randn(3, requires_grad=True)
    y = remake(torch.sin, x)
    assert origin_of(y) is not None
    assert origin_of(y.add_(1)) is None
    with torch.no_grad():
        assert origin_of(remake(torch.sin, x)) is None


def test_a_gradient_flows_to_the_inputs_that_want_one_and_as_often_as_asked() -> None:
    x, y = torch.randn(4, requires_grad=True), torch.randn(4)
    product = remake(torch.mul, x, y)
    for _ in range(2):
        (found,) = torch.autograd.grad(product.sum(), x, retain_graph=True)
        assert torch.equal(found, y)
