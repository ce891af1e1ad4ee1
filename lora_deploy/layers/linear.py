"""A linear layer with a low-rank branch: h = W0 x + scaling * B(A(dropout(x))).

LoRA: https://arxiv.org/abs/2106.09685, equation 3. DoRA: https://arxiv.org/abs/2402.09353, equation 5, whose norm is a
constant in the gradient (section 4.3). The base may be dense or quantized by bitsandbytes.
"""

from __future__ import annotations

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import nn

from lora_deploy.layers.fused import fused_lora
from lora_deploy.layers.recompute import saves_for_backward
from lora_deploy.quantization import QuantizedWeight, keep_codes, quantized_weight

__all__ = ["LoraLinear"]


class LoraLinear(nn.Module):
    """A frozen linear layer and the trainable update beside it.

    Build it with `from_base`. The base module is kept as it is, in `base_layer`: its type, device, dtype, bias and
    quantization state are its own. `A` is `lora_A.weight` (r, in) and `B` is `lora_B.weight` (out, r), float32.

    Attributes:
        base_layer: nn.Linear, Conv1D, Linear4bit or Linear8bitLt, frozen.
        scaling: The factor on B @ A.
        lora_magnitude_vector: DoRA's length of each row of the merged weight, (out,) float32; None for plain LoRA.
        active: Whether there is any update; if not, the layer is its base.
        fused: Whether training keeps no more than the input for the backward; if not, autograd keeps what it likes.
            Second derivatives and torch.func need False. DoRA, a bias of B, hooks on the parts and torch.compile take
            the plain way by themselves.
        merge_weights: Merge on `.eval()` and unmerge on `.train()`.
    """

    lora_magnitude_vector: nn.Parameter | None

    def __init__(
        self,
        base_layer: nn.Module,
        r: int,
        scaling: float,
        *,
        lora_dropout: float = 0.0,
        init_lora_weights: bool | str = True,
        merge_weights: bool = False,
        use_dora: bool = False,
        lora_bias: bool = False,
    ) -> None:
        super().__init__()
        keep_codes(base_layer)
        base_layer.requires_grad_(False)
        self.base_layer = base_layer
        self.scaling = scaling
        self.active = self.fused = True
        self.merge_weights = merge_weights
        out_features, in_features = self.base_weight().shape
        device = next(base_layer.parameters()).device
        self.lora_dropout = nn.Dropout(lora_dropout) if lora_dropout > 0 else nn.Identity()
        self.lora_A = nn.Linear(in_features, r, bias=False, device=device, dtype=torch.float32)
        self.lora_B = nn.Linear(r, out_features, bias=lora_bias, device=device, dtype=torch.float32)
        magnitude = nn.Parameter(torch.ones(out_features, device=device)) if use_dora else None
        self.register_parameter("lora_magnitude_vector", magnitude)
        self.reset_lora_parameters(init_lora_weights)
        self._merged: torch.Tensor | None = None
        self.train(base_layer.training)

    @classmethod
    def from_base(
        cls,
        base_layer: nn.Module,
        r: int = 8,
        lora_alpha: float = 8,
        *,
        scaling: float | None = None,
        lora_dropout: float = 0.0,
        init_lora_weights: bool | str = True,
        merge_weights: bool = False,
        use_dora: bool = False,
        lora_bias: bool = False,
    ) -> LoraLinear:
        """Put an adapter on a linear layer.

        Args:
            base_layer: nn.Linear, transformers' Conv1D, bitsandbytes' Linear4bit or Linear8bitLt.
            r: Rank.
            lora_alpha: Numerator of the scaling, lora_alpha / r.
            scaling: The factor itself, in the place of lora_alpha / r.
            lora_dropout: Dropout probability on the input of A while training.
            init_lora_weights: True: A Kaiming-uniform; "gaussian": A normal with std 1/r; B zero in both. "orthogonal":
                both random, B @ A zero. False: B is random too.
            merge_weights: Merge on `.eval()`, unmerge on `.train()`.
            use_dora: Train the length of each row of the weight too.
            lora_bias: Give B a bias, zero at first.

        Returns:
            The new layer, in the base's training mode. With B zero its output equals the base's bit for bit (with DoRA,
            but for the rounding of a factor of one).

        Raises:
            TypeError: `base_layer` is no linear layer.
        """
        return cls(
            base_layer,
            r,
            lora_alpha / r if scaling is None else scaling,
            lora_dropout=lora_dropout,
            init_lora_weights=init_lora_weights,
            merge_weights=merge_weights,
            use_dora=use_dora,
            lora_bias=lora_bias,
        )

    def reset_lora_parameters(self, init_lora_weights: bool | str = True) -> None:
        """Initialize A at random and B with zero (with `False`, both at random), as PEFT does; then the magnitudes.

        "orthogonal" makes both random with B @ A zero; its rank must be even.
        """
        if init_lora_weights == "orthogonal":
            self._reset_orthogonal()
        else:
            if init_lora_weights == "gaussian":
                nn.init.normal_(self.lora_A.weight, std=1 / self.r)
            else:
                nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
            if init_lora_weights is False:
                nn.init.kaiming_uniform_(self.lora_B.weight, a=math.sqrt(5))
            else:
                nn.init.zeros_(self.lora_B.weight)
        if self.lora_B.bias is not None:
            nn.init.zeros_(self.lora_B.bias)
        if self.lora_magnitude_vector is not None:
            with torch.no_grad():
                self.lora_magnitude_vector.copy_(self._row_norms())

    @torch.no_grad()
    def _reset_orthogonal(self) -> None:
        """https://datta0.github.io/posts/rethink-lora-init/: every other row of one rotation for A, the rest for B."""
        rotation, _ = torch.linalg.qr(torch.randn(self.r, self.r))
        self.lora_A.weight.copy_((torch.randn(self.in_features, self.r // 2) @ rotation[0::2]).t() / 10)
        self.lora_B.weight.copy_(torch.randn(self.r // 2, self.out_features).t() @ rotation[1::2] / 10)

    @property
    def r(self) -> int:
        """The rank."""
        return self.lora_A.out_features

    @property
    def in_features(self) -> int:
        """Size of the input."""
        return self.lora_A.in_features

    @property
    def out_features(self) -> int:
        """Size of the output."""
        return self.lora_B.out_features

    @property
    def weight(self) -> torch.Tensor:
        """The base's parameter as it is stored (for code that asks for a device or a dtype)."""
        return cast(torch.Tensor, self.base_layer.weight)

    @property
    def bias(self) -> torch.Tensor | None:
        """The base's bias, (out,)."""
        return cast("torch.Tensor | None", self.base_layer.bias)

    @property
    def merged(self) -> bool:
        """Whether the forward uses the merged weight."""
        return self._merged is not None

    def base_weight(self) -> QuantizedWeight:
        """The base's weight, (out, in), as it is stored."""
        return quantized_weight(self.base_layer)

    def delta_weight(self) -> torch.Tensor:
        """scaling * B @ A in float32, (out, in)."""
        return self.scaling * (self.lora_B.weight.detach().float() @ self.lora_A.weight.detach().float())

    def _row_norms(self) -> torch.Tensor:
        """|row of dequantize(W0) + scaling * B @ A|, float32 (out,)."""
        norms: torch.Tensor = torch.linalg.vector_norm(self.base_weight().dequantize().add_(self.delta_weight()), dim=1)
        return norms

    def merged_weight(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """dequantize(W0) + scaling * B @ A, with DoRA each row brought to its magnitude.

        Computed in float32 and rounded once to `dtype`, (out, in).
        """
        merged = self.base_weight().dequantize().add_(self.delta_weight())
        if self.lora_magnitude_vector is not None:
            merged.mul_((self.lora_magnitude_vector / torch.linalg.vector_norm(merged, dim=1))[:, None])
        return merged.to(dtype)

    @torch.no_grad()
    def merge(self) -> None:
        """Run with one weight, `merged_weight()`, from now on. The base's own bits stay untouched beside it.

        The weight has the dtype of a dense base; over a quantized base it is float32. Merging twice does nothing.
        """
        if self._merged is None:
            dense = self.base_weight().scheme == "none"
            self._merged = self.merged_weight(self.weight.dtype if dense else torch.float32)

    def unmerge(self) -> None:
        """Undo `merge()` exactly: base and branch run side by side again, the base with its original bits."""
        self._merged = None

    def train(self, mode: bool = True) -> LoraLinear:
        """Set the training mode; with `merge_weights`, unmerge for training and merge for evaluation."""
        super().train(mode)
        if self.merge_weights and hasattr(self, "_merged"):
            self.unmerge() if mode else self.merge()
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the layer.

        Args:
            x: (..., in).

        Returns:
            (..., out), of the base's output type.
        """
        if self._merged is not None:
            bias = self._merged_bias()
            return F.linear(x.to(self._merged.dtype), self._merged, bias).to(x.dtype)
        if self.active and self.fused and self._can_be_fused(x):
            a, b = self.lora_A.weight, self.lora_B.weight
            return fused_lora(self.base_layer, x, a, b, self.scaling, self._dropout())
        result = cast(torch.Tensor, self.base_layer(x))
        if not self.active:
            return result
        dropped = self.lora_dropout(x.to(self.lora_A.weight.dtype))
        branch = self.lora_B(self.lora_A(dropped)) * self.scaling
        if self.lora_magnitude_vector is not None:
            branch = self._dora(result, dropped, branch, x.dtype)
        return cast(torch.Tensor, result + branch.to(result.dtype))

    def _can_be_fused(self, x: torch.Tensor) -> bool:
        """Whether a graph is made, of a plain branch beside a frozen weight, and nobody looks in between."""
        varied = self.lora_magnitude_vector is not None or self.lora_B.bias is not None
        if varied or not saves_for_backward(x, self.lora_A.weight, self.lora_B.weight, self.bias):
            return False
        parts = (self.base_layer, self.lora_A, self.lora_B, self.lora_dropout)
        watched = any(part._forward_hooks or part._forward_pre_hooks for part in parts)
        return not (watched or self.weight.requires_grad)

    def _dropout(self) -> float:
        """The probability in force; 0 in evaluation."""
        part = self.lora_dropout
        return part.p if isinstance(part, nn.Dropout) and part.training else 0.0

    def _dora(
        self, result: torch.Tensor, dropped: torch.Tensor, branch: torch.Tensor, dtype: torch.dtype
    ) -> torch.Tensor:
        """What base and branch together gain when each row has its magnitude; of the dropped-out input, as in PEFT."""
        assert self.lora_magnitude_vector is not None
        ratio = self.lora_magnitude_vector / self._row_norms()
        if isinstance(self.lora_dropout, nn.Dropout):
            result = cast(torch.Tensor, self.base_layer(dropped.to(dtype)))
        own = (result if self.bias is None else result - self.bias.to(result.dtype)).float()
        return (ratio - 1) * own + ratio * branch

    def _merged_bias(self) -> torch.Tensor | None:
        assert self._merged is not None
        own, added = self.bias, self.lora_B.bias
        if added is not None:
            own = added * self.scaling if own is None else own.float() + added * self.scaling
        return None if own is None else own.to(self._merged.dtype)

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self._merged is not None:
            self._merged = fn(self._merged)
        return self

    def extra_repr(self) -> str:
        """Rank and scaling, for `repr`."""
        return f"r={self.r}, scaling={self.scaling:g}, merged={self.merged}"
