"""The dequantized twin: what was trained, written out in plain float32 PyTorch.

Every linear layer is an explicit dequantized weight and a float32 matmul, with the adapter as a branch beside it. It
shares neither the checkpoint reader nor the merge with the export: transformers loads the model, and the branch is
never merged. bitsandbytes' own forward is no reference, for in 8 bits it quantizes the activations too.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeVar, cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lora_deploy.adapter import LoraAdapter, apply_adapter
from lora_deploy.export.graph import quiet
from lora_deploy.quantization import DenseWeight, load_base_model, quantize, quantized_weight
from lora_deploy.quantization.base import TrainingBase
from lora_deploy.quantization.bnb import bitsandbytes as bnb
from lora_deploy.quantization.model import is_linear
from lora_deploy.task import auto_class, is_classification

__all__ = [
    "apply_live",
    "compute_class_logits",
    "compute_logits",
    "compute_logits_and_cache",
    "load_live_model",
    "load_twin",
    "put_parameters",
]

_Model = TypeVar("_Model", bound=nn.Module)


def load_twin(base: TrainingBase) -> PreTrainedModel:
    """The base as it was trained on, dequantized, in float32 on the CPU; `apply_adapter` adds the branch."""
    # A head that the checkpoint lacks is said to need training; the adapter's takes its place.
    with quiet("transformers"):
        model = auto_class(base.task).from_pretrained(
            base.directory,
            dtype="auto",
            attn_implementation="eager",
            use_safetensors=True,
            trust_remote_code=False,
            **_labels(base),
        )
    for name, module in [(name, module) for name, module in model.named_modules() if is_linear(module)]:
        weight = quantized_weight(module)
        if not base.prequantized and name in base.linears and base.scheme.applies_to(name):
            weight = quantize(cast(DenseWeight, weight).values, base.scheme)
        if weight.scheme == "none":
            continue
        values = weight.dequantize()
        if isinstance(module, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)):
            plain = nn.Linear(values.shape[1], values.shape[0], bias=module.bias is not None, device="meta")
            plain.bias = module.bias
            plain.weight = nn.Parameter(values)
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, plain)
        else:
            module.weight = nn.Parameter(values.t().contiguous() if isinstance(module, Conv1D) else values)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        parameter.data = parameter.data.float()
    return cast(PreTrainedModel, model.train(False))


def apply_live(twin: _Model, adapter: LoraAdapter) -> _Model:
    """Put an adapter beside the twin's layers, in place, as a branch that is never merged."""
    # Each side of a tie for itself, as the file has it: nothing is trained here.
    config = adapter.config.model_copy(update={"merge_weights": False, "ensure_weight_tying": False})
    return cast(_Model, apply_adapter(twin, replace(adapter, config=config)).eval())


def put_parameters(model: PreTrainedModel, parameters: Mapping[str, torch.Tensor]) -> None:
    """Let parameters that an adapter trained whole take the place of the twin's, in place."""
    for name, values in parameters.items():
        model.get_parameter(name).data = values.float()


def load_live_model(base: TrainingBase, adapter: LoraAdapter | None) -> PreTrainedModel:
    """The model as bitsandbytes runs it, adapter included; only to report how far its forward is from the twin's."""
    with quiet("transformers"):
        model = load_base_model(str(base.directory), base.scheme, task=base.task, **_labels(base))
    if adapter is not None:
        apply_adapter(model, adapter)
    return cast(PreTrainedModel, model.train(False))


def _labels(base: TrainingBase) -> dict[str, Any]:
    return {"num_labels": base.config.num_labels} if is_classification(base.task) else {}


@torch.inference_mode()
def compute_class_logits(model: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Logits of a classifier; of a classifier of sequences as those of a text of one token.

    Args:
        model: The twin.
        input_ids: (batch, length).
        attention_mask: (batch, length), 0 for padding anywhere in a row.

    Returns:
        float32 (batch, 1, labels), or (batch, length, labels) for a classifier of tokens.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="MatMul8bitLt: inputs will be cast")
        output = model(input_ids=input_ids, attention_mask=attention_mask)
    logits = cast(torch.Tensor, output.logits.float())
    return logits if logits.ndim == 3 else logits[:, None]


@torch.inference_mode()
def compute_logits(model: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Logits of a padded batch without any cache.

    Args:
        model: The twin.
        input_ids: (batch, length).
        attention_mask: (batch, length), 0 for padding anywhere in a row.

    Returns:
        float32 (batch, length, vocabulary); rows of padding hold nothing of meaning.
    """
    return cast(torch.Tensor, _run(model, input_ids, attention_mask, use_cache=False).logits.float())


@torch.inference_mode()
def compute_logits_and_cache(
    model: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor
) -> tuple[torch.Tensor, Any]:
    """As `compute_logits`, and the cache that transformers leaves; None for a model that has none."""
    output = _run(model, input_ids, attention_mask, use_cache=True)
    name = "cache" if hasattr(output, "cache") else "past_key_values"  # the older name, before transformers 5.24
    return output.logits.float(), getattr(output, name, None)


def _run(model: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor, *, use_cache: bool) -> Any:
    position_ids = (attention_mask.cumsum(dim=1) - 1).clamp_(min=0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="MatMul8bitLt: inputs will be cast")
        return model(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=use_cache)
