"""Quantize a weight with bitsandbytes' own kernels, so that training and export get the same codes."""

from __future__ import annotations

import torch
from bitsandbytes import functional as bnb

from lora_deploy.quantization.scheme import QuantizationScheme
from lora_deploy.quantization.weight import Blockwise4BitWeight, DenseWeight, Int8Weight, QuantizedWeight

__all__ = ["expand_absmax", "quantize"]

# Weights quantized in one go: bitsandbytes' CPU kernel needs about 20 bytes of scratch for each.
_PIECE = 1 << 20


def quantize(weight: torch.Tensor, scheme: QuantizationScheme) -> QuantizedWeight:
    """Quantize one weight as bitsandbytes does on load.

    Args:
        weight: (out, in), floating point.
        scheme: What to quantize to; its `weight_dtype` is applied first.

    Returns:
        The quantized weight, on the same device.
    """
    if scheme.weight_dtype is not None:
        weight = weight.to(getattr(torch, scheme.weight_dtype))
    if scheme.method == "none":
        return DenseWeight(weight)
    rows, columns = weight.shape
    if scheme.method == "int8":
        # bitsandbytes casts to float16 before it quantizes, whatever the checkpoint's type.
        codes, row_absmax, _ = bnb.int8_vectorwise_quant(weight.to(torch.float16).contiguous())
        return Int8Weight(codes, row_absmax)
    codes, absmax = _quantize_4bit(weight.contiguous().reshape(-1), scheme)
    if scheme.double_quant:
        absmax = _round_trip_absmax(absmax)
    return Blockwise4BitWeight(codes, absmax, (rows, columns), scheme.method, scheme.blocksize)


def _quantize_4bit(flat: torch.Tensor, scheme: QuantizationScheme) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and absmax of a flat weight, in pieces of whole blocks and whole bytes to bound the scratch memory."""
    piece = max(1, _PIECE // (2 * scheme.blocksize)) * 2 * scheme.blocksize
    codes, absmax = [], []
    for part in torch.split(flat, piece):
        part_codes, state = bnb.quantize_4bit(
            part, blocksize=scheme.blocksize, compress_statistics=False, quant_type=scheme.method
        )
        codes.append(part_codes.reshape(-1))
        absmax.append(state.absmax.float())
    return torch.cat(codes), torch.cat(absmax)


def _round_trip_absmax(absmax: torch.Tensor) -> torch.Tensor:
    """What double quantization leaves of the absmax values: 8-bit codes in blocks of 256 around their mean."""
    offset = absmax.mean()
    codes, state = bnb.quantize_blockwise(absmax - offset, blocksize=256)
    return expand_absmax(codes, state.code, state.absmax, offset, state.blocksize)


def expand_absmax(
    codes: torch.Tensor, table: torch.Tensor, nested_absmax: torch.Tensor, offset: torch.Tensor | float, blocksize: int
) -> torch.Tensor:
    """Undo double quantization: table[codes] * nested_absmax[i // blocksize] + offset, in float32.

    Args:
        codes: uint8 (n,).
        table: float32 (256,), the dynamic 8-bit code.
        nested_absmax: float32 (ceil(n / blocksize),).
        offset: The mean that was taken off.
        blocksize: Codes a nested block.

    Returns:
        float32 (n,).
    """
    count = codes.numel()
    scale = nested_absmax.float().repeat_interleave(blocksize)[:count]
    return table.float()[codes.reshape(-1).to(torch.int64)] * scale + offset
