"""Hashes that say whether two bases are the same, tensor for tensor."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import nn

from lora_deploy.quantization.bnb import bitsandbytes as bnb
from lora_deploy.quantization.model import quantized_weight

__all__ = ["combine_hashes", "hash_codes", "hash_tensors"]


def hash_tensors(named: Iterator[tuple[str, list[torch.Tensor]]]) -> str:
    """SHA-256 over names, types, shapes and bytes, in the order given."""
    digest = hashlib.sha256()
    for name, tensors in named:
        for tensor in tensors:
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
            digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def hash_codes(model: nn.Module) -> str | None:
    """Hash of the quantized weights of a model's linear layers (`TrainingRecord.codes_sha256`), adapters apart.

    Returns:
        The hash, or None where no layer is quantized.
    """
    hashes = {}
    for name, module in model.named_modules():
        if isinstance(module, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)):
            name = name.removesuffix(".base_layer")
            hashes[name] = hash_tensors(iter([(name, list(quantized_weight(module).stored()))]))
    return combine_hashes(hashes)


def combine_hashes(hashes: dict[str, str]) -> str | None:
    """One hash of several, whatever their order; None for none."""
    if not hashes:
        return None
    return hashlib.sha256("".join(f"{name}:{hashes[name]}\n" for name in sorted(hashes)).encode()).hexdigest()
