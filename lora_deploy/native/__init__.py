"""Kernels in C, for onnxruntime and for weights, compiled on the user's machine. Optional: nothing else needs them."""

from lora_deploy.native.build import load_kernels

__all__ = ["load_kernels"]
