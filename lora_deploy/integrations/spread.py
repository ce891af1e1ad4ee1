"""Parameters that are spread over processes, by FSDP2 or DeepSpeed ZeRO-3: gathered one by one, by all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from lora_deploy.errors import UsageError

__all__ = ["alone", "is_spread", "meeting", "refuse_spread", "trained_tensors", "whole", "will_be_spread"]

_LONGEST = timedelta(days=7)  # an export and its check


def will_be_spread() -> bool:
    """Whether the Trainer that has just been made will spread the parameters, or has them spread already.

    Raises:
        UsageError: In a way that is not known here.
    """
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    state = AcceleratorState()
    kind = state.distributed_type
    if kind == DistributedType.DEEPSPEED:
        return bool(is_deepspeed_zero3_enabled())  # type: ignore[no-untyped-call]
    old = kind == DistributedType.FSDP and state.fsdp_plugin.fsdp_version != 2
    if old or kind == DistributedType.MEGATRON_LM:
        raise UsageError(
            "the parameters would be spread over processes in a way that ExportCallback does not gather",
            found="FSDP, version 1" if old else "Megatron-LM",
            expected="FSDP2, DeepSpeed, or all parameters in each process",
            remedy="fsdp_version: 2; or leave the callback out, and export the saved adapter: lora-deploy export",
        )
    return bool(kind == DistributedType.FSDP)


def is_spread(model: nn.Module) -> bool:
    """Whether no process has all of the parameters."""
    return any(isinstance(values, DTensor) or _is_of_zero(values) for values in model.parameters())


def refuse_spread(model: nn.Module) -> None:
    """Make sure that this process has all of the parameters.

    Raises:
        UsageError: They are spread.
    """
    if is_spread(model) or not all(values.numel() for values in model.parameters()):
        raise UsageError(
            "the parameters of this model are spread over processes, so that this one cannot export them",
            found="FSDP, DeepSpeed ZeRO-3, or what has the same effect",
            expected="an ExportCallback that was given to the Trainer when it was made: callbacks=[...]",
            remedy="give it there; or leave it out, and export the saved adapter: lora-deploy export --adapter DIR",
        )


@contextmanager
def whole(values: nn.Parameter) -> Iterator[torch.Tensor]:
    """All of a parameter, for as long as it is needed; every process must ask for it."""
    if isinstance(values, DTensor):
        yield values.full_tensor().detach()
    elif _is_of_zero(values):
        import deepspeed

        with deepspeed.zero.GatheredParameters([values]):
            yield values.detach()
    else:
        yield values.detach()


def trained_tensors(model: nn.Module, *, keep: bool) -> dict[str, torch.Tensor]:
    """What is trained, whole and on the CPU, by its names in the model; every process must ask for it.

    Args:
        model: The model.
        keep: Whether this process wants it; the others get nothing.
    """
    tensors = {}
    for name, values in model.named_parameters():
        if values.requires_grad:
            with whole(values) as found:
                if keep:
                    tensors[name] = found.to("cpu", copy=True)
    return tensors


def meeting(world_size: int) -> Callable[[], None]:
    """A place where processes wait for each other for longer than other collectives may take; all must ask for it."""
    if world_size == 1:
        return lambda: None
    group = torch.distributed.new_group(backend="gloo", timeout=_LONGEST)
    return lambda: torch.distributed.barrier(group)


@contextmanager
def alone() -> Iterator[None]:
    """Models that transformers makes meanwhile belong to this process, though ZeRO-3 spreads those of the training."""
    from transformers.integrations import deepspeed

    kept = deepspeed._hf_deepspeed_config_weak_ref  # which transformers asks, whatever it loads
    deepspeed._hf_deepspeed_config_weak_ref = None
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = kept


def _is_of_zero(values: nn.Parameter) -> bool:
    return hasattr(values, "ds_id")
