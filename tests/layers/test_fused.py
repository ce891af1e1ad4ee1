"""The fused function of base and branch: the plain way is the judge of its values, its gradients and its types."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lora_deploy.layers import LoraLinear
from lora_deploy.layers.fused import fused_lora
from tests.layers.bases import IN, KINDS, OUT, make_base
from tests.layers.kept import kept_storages

RANK, ALPHA = 4, 10


def layers(kind: str, *, dtype: torch.dtype = torch.float32, **options: object) -> tuple[LoraLinear, LoraLinear]:
    """The same layer twice, fused and plain, in training mode."""
    fused = LoraLinear.from_base(make_base(kind, dtype=dtype), RANK, ALPHA, **options)
    nn.init.normal_(fused.lora_B.weight, std=0.3)
    plain = copy.deepcopy(fused)
    plain.fused = False
    return fused, plain


def run(layer: LoraLinear, x: torch.Tensor, up: torch.Tensor, *, autocast: bool = False) -> list[torch.Tensor]:
    """Output and gradients of x, A, B and, where it is trained, the bias."""
    torch.manual_seed(3)
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        y = layer(x)
    trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    return [y.detach(), *torch.autograd.grad(y, [x, *trained], up.to(y.dtype))]


def assert_same(found: list[torch.Tensor], expected: list[torch.Tensor], tolerance: float) -> None:
    """Same types and shapes; values as near as `tolerance` of the largest one."""
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert (one - other).abs().max() <= tolerance * other.abs().max()


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_are_those_of_the_plain_way(kind: str, dropout: float, training: bool) -> None:
    fused, plain = (layer.train(training) for layer in layers(kind, lora_dropout=dropout))
    x, up = torch.randn(2, 7, IN), torch.randn(2, 7, OUT)
    expected = run(plain, x, up)
    assert_same(run(fused, x, up), expected, 2e-6)
    fused.scaling *= 1.001
    with pytest.raises(AssertionError):
        assert_same(run(fused, x, up), expected, 2e-6)


@pytest.mark.parametrize("kind", ["linear", "conv1d", "nf4", "int8"])
def test_a_bias_that_is_trained_gets_its_gradient(kind: str) -> None:
    fused, plain = layers(kind)
    for layer in (fused, plain):
        assert layer.bias is not None
        layer.bias.requires_grad_(True)
    x, up = torch.randn(9, IN), torch.randn(9, OUT)
    found = run(fused, x, up)
    assert len(found) == 5
    assert_same(found, run(plain, x, up), 2e-6)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_the_gradients_are_the_derivatives(kind: str, dropout: float) -> None:
    base = make_base(kind, size=5, dtype=torch.float64)
    base.bias.requires_grad_(True)
    a, b = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 5), (OUT, 3)))
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)

    def compute(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(3)
        return fused_lora(base, x, a, b, 0.7, dropout)

    assert torch.autograd.gradcheck(compute, (x, a, b, base.bias))


@pytest.mark.parametrize("kind", ["linear", "nf4", "int8"])
@pytest.mark.parametrize("wanted", ["x", "A", "B"])
def test_only_what_is_wanted_gets_a_gradient(kind: str, wanted: str) -> None:
    fused, plain = layers(kind)
    x = torch.randn(5, IN, requires_grad=wanted == "x")
    found = []
    for layer in (fused, plain):
        layer.lora_A.weight.requires_grad_(wanted == "A")
        layer.lora_B.weight.requires_grad_(wanted == "B")
        one = {"x": x, "A": layer.lora_A.weight, "B": layer.lora_B.weight}[wanted]
        found.append(torch.autograd.grad(layer(x).sum(), one)[0])
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("kind", ["linear", "conv1d", "nf4"])
def test_a_narrow_base_rounds_where_the_plain_way_does(kind: str, dropout: float) -> None:
    fused, plain = layers(kind, dtype=torch.bfloat16, lora_dropout=dropout)
    x, up = torch.randn(6, IN).bfloat16(), torch.randn(6, OUT).bfloat16()
    assert_same(run(fused, x, up), run(plain, x, up), 2**-7)


@pytest.mark.parametrize("kind", ["linear", "nf4"])
def test_autocast_gives_the_types_of_the_plain_way(kind: str) -> None:
    fused, plain = layers(kind)
    x, up = torch.randn(6, IN), torch.randn(6, OUT).bfloat16().float()
    assert_same(run(fused, x, up, autocast=True), run(plain, x, up, autocast=True), 2**-6)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("kind", ["linear", "nf4"])
def test_under_checkpointing_the_gradients_are_the_same(kind: str, reentrant: bool) -> None:
    fused, _ = layers(kind, lora_dropout=0.4)
    found = []
    for wrap in (False, True):
        torch.manual_seed(3)
        fused.zero_grad()
        x = torch.full((5, IN), 0.3).requires_grad_()
        y = checkpoint(fused, x, use_reentrant=reentrant) if wrap else fused(x)
        y.square().sum().backward()
        found.append([x.grad, *(parameter.grad for parameter in fused.parameters() if parameter.requires_grad)])
    # The reentrant kind computes its outputs without a graph, the plain way.
    assert_same(found[1], found[0], 2e-6 if reentrant else 0)


def test_under_torch_compile_the_plain_way_is_compiled() -> None:
    fused, plain = layers("linear")
    x, up = torch.randn(6, IN), torch.randn(6, OUT)
    torch.compiler.reset()
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    y = compiled(x)
    assert "FusedLora" not in type(y.grad_fn).__name__
    assert "FusedLora" in type(fused(x).grad_fn).__name__
    found = torch.autograd.grad(y, list(fused.lora_A.parameters()), up)
    assert_same(list(found), [run(plain, x, up)[2]], 2e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_layers_of_one_input_keep_that_input_alone(kind: str) -> None:
    trio = [layers(kind)[0] for _ in range(3)]
    x = torch.randn(2, 8, IN, requires_grad=True)
    own = [parameter for layer in trio for parameter in layer.parameters()]

    def forward() -> list[torch.Tensor]:
        return [layer(x) for layer in trio]

    assert kept_storages(forward, own) == {x.data_ptr(): x.nbytes}
    for layer in trio:
        layer.fused = False
    assert sum(kept_storages(forward, own).values()) > x.nbytes


def test_a_dropout_keeps_a_bit_for_each_number() -> None:
    fused, plain = layers("linear", lora_dropout=0.4)
    x = torch.randn(3, 7, IN, requires_grad=True)
    kept = kept_storages(lambda: fused(x), fused.parameters())
    assert sorted(kept.values()) == [x.numel() // 8, x.nbytes]
    assert sum(kept_storages(lambda: plain(x), plain.parameters()).values()) >= 2 * x.nbytes


@pytest.mark.parametrize("part", ["base_layer", "lora_A", "lora_B"])
def test_who_watches_a_part_still_sees_it(part: str) -> None:
    fused, plain = layers("linear")
    seen: list[torch.Tensor] = []
    fused.get_submodule(part).register_forward_hook(lambda *called: seen.append(called[-1]))
    x, up = torch.randn(6, IN), torch.randn(6, OUT)
    assert_same(run(fused, x, up), run(plain, x, up), 0)
    assert len(seen) == 1


def test_a_second_derivative_is_refused_and_the_plain_way_has_it() -> None:
    fused, plain = layers("linear")
    x = torch.randn(4, IN, requires_grad=True)
    (first,) = torch.autograd.grad(fused(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()
    (first,) = torch.autograd.grad(plain(x).square().sum(), x, create_graph=True)
    assert torch.autograd.grad(first.sum(), plain.lora_A.weight)[0].abs().max() > 0
