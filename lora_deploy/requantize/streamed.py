"""A text goes through the transformers model with the weights of one layer in memory at a time."""

from __future__ import annotations

import ctypes
import platform
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lora_deploy.requantize.text import Text
from lora_deploy.requantize.turns import Turns
from lora_deploy.task import auto_class

if TYPE_CHECKING:
    from lora_deploy.export.merge import MergedParameters

__all__ = ["cut", "run_streamed"]

# Gets the layer's name, its weight (out, in), its bias and its inputs of all batches; what it returns makes the output
# of each batch from its input.
Linear = Callable[
    [str, torch.Tensor, "torch.Tensor | None", Sequence[torch.Tensor]], Callable[[torch.Tensor], torch.Tensor]
]

_TOKENS = 1024  # of a batch


def cut(text: Text) -> list[Text]:
    """Batches of few tokens, rows of about the same length together."""
    lengths = text.attention_mask.sum(dim=1)
    order = lengths.argsort(stable=True)
    batches, start = [], 0
    while start < len(order):
        end = start + 1
        while end < len(order) and (end + 1 - start) * int(lengths[order[end]]) <= _TOKENS:
            end += 1
        rows, length = order[start:end], int(lengths[order[end - 1]])
        batches.append(
            replace(
                text,
                input_ids=text.input_ids[rows, :length],
                labels=text.labels[rows, :length],
                attention_mask=text.attention_mask[rows, :length],
            )
        )
        start = end
    return batches


def run_streamed(
    parameters: MergedParameters, batches: Sequence[tuple[torch.Tensor, torch.Tensor]], linear: Linear
) -> list[torch.Tensor]:
    """Run the model without its output head; every linear layer is what `linear` makes of it.

    The batches go through the model together, layer by layer, so that each weight is read once and what lies between
    two layers is in memory for one batch at a time.

    Args:
        parameters: Where each weight is read when its layer runs; it is let go of right after.
        batches: Of each, input_ids and attention_mask, int64 (rows, length), padded on the right.
        linear: Called once for each linear layer but the head.

    Returns:
        Of each batch, float32 (rows, length, hidden): what the head would read.

    Raises:
        UsageError: The batches take different ways through the model.
    """
    base = parameters.base
    with _parameters_on_meta():
        model = cast(
            PreTrainedModel,
            auto_class(base.task).from_config(base.config, attn_implementation="sdpa", trust_remote_code=False),
        )
    model.train(False)
    passes = _Passes(parameters, len(batches), linear)
    for name, module in model.named_modules():
        if name in base.linears and name not in base.heads:
            passes.replace_forward(name, module)
        elif name not in base.heads and any(True for _ in module.parameters(recurse=False)):
            passes.load_when_run(name, module)
    options = {"use_cache": False} if base.task == "causal-lm" else {}

    @torch.inference_mode()
    def one_pass(number: int) -> torch.Tensor:
        passes.own.number = number
        input_ids, attention_mask = batches[number]
        output = model.base_model(input_ids=input_ids, attention_mask=attention_mask, **options)
        return cast(torch.Tensor, output[0])

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        return passes.turns.run(one_pass)


class _Passes:
    """What the modules do in all passes.

    Attributes:
        own: The number of the pass that a thread runs.
    """

    def __init__(self, parameters: MergedParameters, count: int, linear: Linear) -> None:
        self.turns, self.own = Turns(count), threading.local()
        self._parameters, self._count, self._linear = parameters, count, linear

    def replace_forward(self, name: str, module: nn.Module) -> None:
        """A linear layer is what the caller makes of it."""
        transposed, has_bias = isinstance(module, Conv1D), module.bias is not None

        def prepare(inputs: Sequence[torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
            _give_memory_back()
            parameters = self._parameters
            weight = parameters.read(f"{name}.weight", transposed=transposed).float()
            bias = parameters.read(f"{name}.bias").float() if has_bias else None
            update = parameters.adapter.updates.get(name) if parameters.adapter else None
            added = update.scaled_bias() if update is not None else None
            if added is not None:
                bias = added if bias is None else bias + added
            return self._linear(name, weight, bias, inputs)

        def forward(x: torch.Tensor) -> torch.Tensor:
            return self.turns.meet(self.own.number, name, x, prepare)(x)

        module.forward = forward

    def load_when_run(self, name: str, module: nn.Module) -> None:
        """Embeddings and norms: their parameters are there from the first pass that runs them to the last."""
        placeholders = dict(module.named_parameters(recurse=False))
        ran = 0

        # Nothing here holds the module, or it and all that was calibrated would stay until the garbage collector comes.
        def load(module: nn.Module, *_: Any) -> None:
            for key, placeholder in placeholders.items():
                if module._parameters[key] is placeholder:
                    values = self._parameters.read(f"{name}.{key}").float()
                    module._parameters[key] = nn.Parameter(values.view(placeholder.shape), requires_grad=False)

        def release(module: nn.Module, *_: Any) -> None:
            nonlocal ran
            ran += 1
            if ran % self._count == 0:
                module._parameters.update(placeholders)

        module.register_forward_pre_hook(load)
        module.register_forward_hook(release)


def _give_memory_back() -> None:
    """What glibc keeps of freed tensors, for each thread apart, goes back to the system."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


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
