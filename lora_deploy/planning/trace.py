"""One training step without memory: how much of it is alive at once, and which layers read the same input.

The step is run on fake tensors, which have shapes and types and no values. Every storage that an operator makes is
counted while it is alive, as the allocator would count it; so what autograd keeps for the backward, which depends on
where the adapters are, is taken from torch itself, for whatever architecture.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedConfig

from lora_deploy.config import LoraConfig
from lora_deploy.layers import get_lora_model
from lora_deploy.quantization.model import head_modules, is_linear
from lora_deploy.task import Task, auto_class
from lora_deploy.train.chunked_loss import can_be_chunked, chunked_loss

__all__ = ["Meter", "Trace", "find_sites", "trace_step"]


@dataclass(frozen=True)
class Trace:
    """What a training step needs.

    Attributes:
        activations: Most bytes alive at once beside the parameters: what the backward will need, temporaries, and the
            gradients that are there by then.
    """

    activations: int


def trace_step(
    config: PreTrainedConfig, targets: list[str], rank: int, *, batch: int, length: int, compute_dtype: torch.dtype
) -> Trace:
    """Run forward and backward of a language model with an adapter, on fake tensors.

    Args:
        config: Of the model, not quantized: what quantized layers keep for the backward is what dense ones keep.
        targets: As `target_modules` takes them.
        rank: Of the adapter.
        batch: Rows.
        length: Tokens of each.
        compute_dtype: Of the base; the adapter is float32.
    """
    with FakeTensorMode():
        model = auto_class("causal-lm").from_config(
            _without_padding(config), dtype=compute_dtype, trust_remote_code=False
        )
        get_lora_model(model, LoraConfig(r=rank, target_modules=targets))
        model.train()
        ids = torch.zeros(batch, length, dtype=torch.int64)
        mask = torch.ones(batch, length, dtype=torch.int64)
        in_chunks = chunked_loss(model, every_token=True) if can_be_chunked(model) else nullcontext()
        meter = Meter([*model.parameters(), *model.buffers(), ids, mask])
        with meter, in_chunks:
            model(input_ids=ids, attention_mask=mask, labels=ids, use_cache=False).loss.backward()
    return Trace(meter.peak)


class Meter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the storages that are made and still alive.

    Args:
        known: Tensors whose storages are not counted.
    """

    def __init__(self, known: Iterable[torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.alive = self.peak = 0
        self._counted = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor):
                self._count(value)
        return result

    def _count(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self._counted:
            return
        size = storage.nbytes()
        self._counted.add(storage._cdata)
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._forget, storage._cdata, size)

    def _forget(self, key: int, size: int) -> None:
        self._counted.discard(key)
        self.alive -= size


def _without_padding(config: PreTrainedConfig) -> PreTrainedConfig:
    """A configuration under which nobody looks into the tokens for padding: here they have no values."""
    config = copy.deepcopy(config)
    config.pad_token_id = None
    return config


def find_sites(config: PreTrainedConfig, task: Task) -> list[tuple[str, ...]]:
    """The linear layers that read the same tensor (q, k and v; gate and up), as a graph makes one product of them.

    Args:
        config: Of the model.
        task: What it is for.

    Returns:
        Names of the layers, the output head left out, in the order in which they run.
    """
    sites: dict[int, list[str]] = {}
    inputs: list[torch.Tensor] = []  # kept, so that no id is given twice

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            if id(args[0]) not in sites:
                inputs.append(args[0])
            sites.setdefault(id(args[0]), []).append(name)

        return hook

    with FakeTensorMode(), torch.no_grad():
        model = auto_class(task).from_config(_without_padding(config), trust_remote_code=False)
        heads = head_modules(model)
        for name, module in model.named_modules():
            if is_linear(module) and name not in heads:
                module.register_forward_pre_hook(watch(name))
        ids = torch.zeros(1, 4, dtype=torch.int64)
        model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids))
    return [tuple(names) for names in sites.values()]
