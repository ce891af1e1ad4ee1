"""Adapters outside of a model: what they hold, and PEFT's files."""

from lora_deploy.adapter.adapter import LoraAdapter, LoraUpdate
from lora_deploy.adapter.files import read_adapter, write_adapter
from lora_deploy.adapter.model import adapter_of, apply_adapter, load_adapter, save_adapter
from lora_deploy.adapter.record import TrainingRecord

__all__ = [
    "LoraAdapter",
    "LoraUpdate",
    "TrainingRecord",
    "adapter_of",
    "apply_adapter",
    "load_adapter",
    "read_adapter",
    "save_adapter",
    "write_adapter",
]
