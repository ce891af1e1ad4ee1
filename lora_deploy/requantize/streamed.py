"""One forward pass through the transformers model with the weights of one layer in memory at a time."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lora_deploy.task import auto_class

if TYPE_CHECKING:
    from lora_deploy.export.merge import MergedParameters

__all__ = ["run_streamed"]

# Gets the layer's name, its weight (out, in), its bias and its input; returns its output.
Linear = Callable[[str, torch.Tensor, "torch.Tensor | None", torch.Tensor], torch.Tensor]


@torch.inference_mode()
def run_streamed(
    parameters: MergedParameters, input_ids: torch.Tensor, attention_mask: torch.Tensor, linear: Linear
) -> torch.Tensor:
    """Run the model without its output head; every linear layer is what `linear` makes of it.

    Args:
        parameters: Where each weight is read when its layer runs; it is let go of right after.
        input_ids: int64 (batch, length), padded on the right.
        attention_mask: int64 (batch, length).
        linear: Called for each linear layer but the head.

    Returns:
        float32 (batch, length, hidden): what the head would read.
    """
    base = parameters.base
    with _parameters_on_meta():
        model = cast(PreTrainedModel, auto_class(base.task).from_config(base.config, attn_implementation="sdpa"))
    model.train(False)
    for name, module in model.named_modules():
        if name in base.linears and name not in base.heads:
            _replace_forward(name, module, parameters, linear)
        elif name not in base.heads and any(True for _ in module.parameters(recurse=False)):
            _load_when_run(name, module, parameters)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        options = {"use_cache": False} if base.task == "causal-lm" else {}
        output = model.base_model(input_ids=input_ids, attention_mask=attention_mask, **options)
    return cast(torch.Tensor, output[0])


def _replace_forward(name: str, module: nn.Module, parameters: MergedParameters, linear: Linear) -> None:
    transposed = isinstance(module, Conv1D)

    def forward(x: torch.Tensor) -> torch.Tensor:
        weight = parameters.read(f"{name}.weight", transposed=transposed).float()
        bias = parameters.read(f"{name}.bias").float() if module.bias is not None else None
        update = parameters.adapter.updates.get(name) if parameters.adapter else None
        added = update.scaled_bias() if update is not None else None
        if added is not None:
            bias = added if bias is None else bias + added
        return linear(name, weight, bias, x)

    module.forward = forward


def _load_when_run(name: str, module: nn.Module, parameters: MergedParameters) -> None:
    """Embeddings and norms: their parameters are there while they run."""
    own = dict(module.named_parameters(recurse=False))

    def load(*_: Any) -> None:
        for key, placeholder in own.items():
            values = parameters.read(f"{name}.{key}").float()
            module._parameters[key] = nn.Parameter(values.view(placeholder.shape), requires_grad=False)

    def release(*_: Any) -> None:
        module._parameters.update(own)

    module.register_forward_pre_hook(load)
    module.register_forward_hook(release)


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Modules made inside have parameters without memory; buffers (tables of rotary embeddings) have their values."""
    original = nn.Module.register_parameter

    def register(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None:
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=False)
        original(module, name, parameter)

    nn.Module.register_parameter = register  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]
