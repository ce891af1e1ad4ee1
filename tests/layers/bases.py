"""One small base layer of every kind that an adapter can sit on."""

from __future__ import annotations

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_deploy.quantization import QuantizationScheme, quantize_model

IN, OUT = 64, 96
_SCHEMES = {
    "nf4": QuantizationScheme(method="nf4"),
    "nf4-single": QuantizationScheme(method="nf4", double_quant=False),
    "fp4": QuantizationScheme(method="fp4"),
    "fp4-single": QuantizationScheme(method="fp4", double_quant=False),
    "int8": QuantizationScheme(method="int8"),
}
KINDS = ("linear", "conv1d", *_SCHEMES)


def make_base(kind: str, *, bias: bool = True, dtype: torch.dtype = torch.float32, size: int = IN) -> nn.Module:
    """A random base layer, `size` -> OUT, in training mode."""
    if kind == "conv1d":
        base: nn.Module = Conv1D(OUT, size)
        nn.init.normal_(base.weight, std=0.2)
        nn.init.normal_(base.bias)
        return base.to(dtype)
    linear = nn.Linear(size, OUT, bias=bias).to(dtype)
    if kind == "linear":
        return linear
    return quantize_model(nn.Sequential(linear), _SCHEMES[kind])[0]


def bits(module: nn.Module) -> dict[str, bytes]:
    """Everything a layer stores, quantization state included, as bytes."""
    return {
        name: values.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        for name, values in module.state_dict().items()
        if isinstance(values, torch.Tensor)
    }
