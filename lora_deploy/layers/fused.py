"""A frozen linear layer and its low-rank branch as one function of the graph, which keeps the input alone.

With d = dropout(x), y = x W^T + bias + s * d A^T B^T. With g the gradient of y, the backward is dA = s * (g B)^T d,
dB = s * g^T (d A^T) and dx = g W + s * dropout'((g B) A). The weight is dequantized once in each direction, d A^T is
computed again, and the mask of a dropout is kept as bits. Where x is itself cheap to make again (`recompute.py`), what
it was made of is kept in its place.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from lora_deploy.layers.recompute import Origin, origin_of
from lora_deploy.quantization import DenseWeight, quantized_weight
from lora_deploy.quantization.bnb import bitsandbytes as bnb
from lora_deploy.quantization.model import ExactLinear4bit

__all__ = ["fused_lora"]


@dataclass(frozen=True)
class _Branch:
    """What does not change between forward and backward.

    Attributes:
        base: The frozen layer.
        scaling: The factor on B @ A.
        dropout: Probability; 0 for none.
        compute: Type that the branch is computed in.
    """

    base: nn.Module
    scaling: float
    dropout: float
    compute: torch.dtype


def fused_lora(
    base: nn.Module, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float, dropout: float = 0.0
) -> torch.Tensor:
    """Compute base(x) + scaling * dropout(x) A^T B^T, to be differentiated once.

    Args:
        base: nn.Linear, Conv1D, Linear4bit or Linear8bitLt, whose weight is frozen. Its bias may be trained.
        x: (..., in).
        a: (r, in).
        b: (out, r).
        scaling: The factor on B @ A.
        dropout: Probability on the input of A; the random numbers drawn are those of `nn.Dropout`.

    Returns:
        (..., out), of the base's output type.
    """
    kind = x.device.type
    compute = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else a.dtype
    branch = _Branch(base, scaling, dropout, compute)
    return cast(torch.Tensor, _FusedLora.apply(branch, origin_of(x), x, a, b, base.bias))  # type: ignore[no-untyped-call]


class _FusedLora(torch.autograd.Function):
    """See the module."""

    @staticmethod
    def forward(
        ctx: Any,
        branch: _Branch,
        origin: Origin | None,
        x: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        result = cast(torch.Tensor, branch.base(x))
        rows, bits = x.reshape(-1, x.shape[-1]).to(branch.compute), None
        if branch.dropout:
            rows, mask = torch.native_dropout(rows, branch.dropout, True)
            bits = _pack(mask)
        low, up = rows @ a.t().to(branch.compute), b.t().to(branch.compute)
        flat = result.view(-1, result.shape[-1])
        if result.dtype == branch.compute:
            flat.addmm_(low, up, alpha=branch.scaling)
        else:
            flat.add_((low @ up).mul_(branch.scaling).to(result.dtype))

        ctx.branch, ctx.recipe, ctx.like_x = branch, None, (x.shape, x.dtype)
        ctx.bias_dtype = None if bias is None else bias.dtype
        kept: tuple[torch.Tensor, ...] = ()
        if a.requires_grad or b.requires_grad:
            kept = (x,)
            if origin is not None:
                ctx.recipe, kept = origin.recipe, origin.inputs
        ctx.save_for_backward(a, b, bits, *kept)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        branch: _Branch = ctx.branch
        a, b, bits, *kept = ctx.saved_tensors
        shape, dtype = ctx.like_x
        grad = grad.reshape(-1, grad.shape[-1])
        mask = None if bits is None else _unpack(bits, len(grad), shape[-1])
        with torch.autocast(grad.device.type, enabled=False):
            narrow = grad.to(branch.compute)
            high = (narrow @ b.to(branch.compute)).mul_(branch.scaling)
            grad_x = grad_a = grad_b = grad_bias = None
            if kept:
                x = kept[0] if ctx.recipe is None else ctx.recipe.again(kept)
                rows = x.reshape(-1, shape[-1]).to(branch.compute)
                if mask is not None:
                    rows = torch.ops.aten.native_dropout_backward(rows, mask, 1 / (1 - branch.dropout))
                grad_a = (high.t() @ rows).to(a.dtype)
                low = rows @ a.t().to(branch.compute)
                grad_b = (low.t() @ narrow).mul_(branch.scaling).t().to(b.dtype)
            if ctx.needs_input_grad[2]:
                grad_x = _input_gradient(branch, grad, high, a, mask, dtype).view(shape)
            if ctx.needs_input_grad[5]:
                grad_bias = grad.sum(0, dtype=ctx.bias_dtype)
        return None, None, grad_x, grad_a, grad_b, grad_bias


def _input_gradient(
    branch: _Branch,
    grad: torch.Tensor,
    high: torch.Tensor,
    a: torch.Tensor,
    mask: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Of x as rows: through the base, and added to it in place through the branch."""
    through_base = branch.base.compute_dtype if isinstance(branch.base, bnb.nn.Linear4bit) else None
    grad = grad.to(through_base or grad.dtype)
    result = (grad @ _values(branch.base, grad.dtype)).to(dtype)
    a = a.to(branch.compute)
    if mask is None and dtype == branch.compute:
        return result.addmm_(high, a)
    through_branch = high @ a
    if mask is not None:
        through_branch = torch.ops.aten.native_dropout_backward(through_branch, mask, 1 / (1 - branch.dropout))
    return result.add_(through_branch.to(dtype))


def _values(base: nn.Module, dtype: torch.dtype) -> torch.Tensor:
    """The base's weight (out, in), by bitsandbytes' own kernel where that reads the codes rightly."""
    if isinstance(base, bnb.nn.Linear4bit) and not (isinstance(base, ExactLinear4bit) and base.weight.is_cpu):
        values: torch.Tensor = bnb.functional.dequantize_4bit(base.weight.data.view(-1, 1), base.weight.quant_state)
        return values.to(dtype)
    weight = quantized_weight(base)
    return weight.values.to(dtype) if isinstance(weight, DenseWeight) else weight.dequantize(dtype)


def _pack(mask: torch.Tensor) -> torch.Tensor:
    """A mask as uint8, eight places a byte."""
    places = F.pad(mask.reshape(-1).view(torch.uint8), (0, -mask.numel() % 8)).view(-1, 8)
    return places.mul_(_powers(mask.device)).sum(1, dtype=torch.uint8)


def _unpack(bits: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """What `_pack` packed, bool (rows, columns)."""
    places = bits[:, None].bitwise_and(_powers(bits.device)).ne(0)
    return places.view(-1)[: rows * columns].view(rows, columns)


def _powers(device: torch.device) -> torch.Tensor:
    return torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=device)
