"""How far what each layer leaves in the cache is from the reference's: where in a model an error begins.

Keys and values are linear in what enters a layer, every decoder has them, and every run of the parity check returns
them: nothing is computed for it, and no graph is changed. What the last layer adds shows in the logits only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from lora_deploy.run.session import numpy_of
from lora_deploy.task import is_classification
from lora_deploy.verify.batches import Batch
from lora_deploy.verify.reference import compute_class_logits, compute_logits, compute_logits_and_cache

__all__ = ["Layers", "Ran", "errors_by_layer", "layers_of", "run_batches", "run_unpadded"]

# Keys and values of each layer, (rows, heads, tokens, size) each.
Layers = list[tuple[torch.Tensor, torch.Tensor]]

_UNPADDED = "single"  # elsewhere padding has keys too, which mean nothing


@dataclass(frozen=True)
class Ran:
    """What something computed of the batches of a check.

    Attributes:
        logits: Of each batch.
        layers: Of the batch without padding; None where there is no cache, or it is no list of keys and values.
    """

    logits: list[torch.Tensor]
    layers: Layers | None = None


def run_batches(model: PreTrainedModel, batches: Sequence[Batch]) -> Ran:
    """What a twin computes of the batches."""
    logits, layers = [], None
    for batch in batches:
        if is_classification(batch.task):
            found = compute_class_logits(model, batch.input_ids, batch.attention_mask)
        elif batch.name == _UNPADDED:
            found, cache = compute_logits_and_cache(model, batch.input_ids, batch.attention_mask)
            layers = _read_cache(cache)
        else:
            found = compute_logits(model, batch.input_ids, batch.attention_mask)
        logits.append(found)
    return Ran(logits, layers)


def run_unpadded(model: PreTrainedModel, batches: Sequence[Batch]) -> Ran:
    """The same of the batch without padding only, for its layers."""
    return run_batches(model, [batch for batch in batches if batch.name == _UNPADDED])


def _read_cache(cache: Any) -> Layers | None:
    """Of transformers' cache; None for what is none of attention."""
    layers: Layers = []
    for layer in getattr(cache, "layers", ()):
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if (
            not isinstance(keys, torch.Tensor)
            or not isinstance(values, torch.Tensor)
            or {keys.ndim, values.ndim} != {4}
        ):
            return None
        layers.append((keys, values))
    return layers or None


def layers_of(batch: Batch, cache: Mapping[str, Any]) -> Layers | None:
    """Of the cache that `OnnxSession.forward` returned; None for a batch that is padded, and where there is none."""
    if batch.name != _UNPADDED or not cache:
        return None
    count = len(cache) // 2
    names = [f"past_key_values.{layer}.{kind}" for layer in range(count) for kind in ("key", "value")]
    if sorted(names) != sorted(cache):
        return None
    tensors = [torch.from_numpy(numpy_of(cache[name]).astype("float32")) for name in names]
    return list(zip(tensors[::2], tensors[1::2], strict=True))


def errors_by_layer(reference: Layers | None, found: Layers | None) -> list[float] | None:
    """The larger of the relative errors (of Euclidean norms) of keys and values, for each layer.

    Args:
        reference: What is right.
        found: What is compared with it. Where one of the two keeps the last tokens only, these are compared.

    Returns:
        None where one of them is None, or they are of other layers or sizes. Infinity where only the reference is zero.
    """
    if reference is None or found is None or len(reference) != len(found):
        return None
    errors = []
    for layers in zip(reference, found, strict=True):
        both = []
        for expected, got in zip(*layers, strict=True):
            tokens = min(expected.shape[2], got.shape[2])
            expected, got = expected[:, :, -tokens:].double().cpu(), got[:, :, -tokens:].double().cpu()
            if expected.shape != got.shape:
                return None
            both.append(_relative(expected, got))
        errors.append(max(both) if not any(error != error for error in both) else float("nan"))
    return errors


def _relative(expected: torch.Tensor, got: torch.Tensor) -> float:
    error, size = float((got - expected).norm()), float(expected.norm())
    return error / size if size else error and float("inf")
