"""Quantized weights as bitsandbytes makes them, and the one place where orientation is settled."""

from lora_deploy.quantization.model import keep_codes, load_base_model, quantize_model, quantized_weight
from lora_deploy.quantization.quantize import quantize
from lora_deploy.quantization.scheme import QuantizationScheme
from lora_deploy.quantization.weight import Blockwise4BitWeight, DenseWeight, Int8Weight, QuantizedWeight

__all__ = [
    "Blockwise4BitWeight",
    "DenseWeight",
    "Int8Weight",
    "QuantizationScheme",
    "QuantizedWeight",
    "keep_codes",
    "load_base_model",
    "quantize",
    "quantize_model",
    "quantized_weight",
]
