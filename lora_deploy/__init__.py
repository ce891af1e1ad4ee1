"""lora-deploy: what you trained is what you deploy.

The public names are loaded when they are first used, so that importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_deploy.adapter import load_adapter as load_adapter
    from lora_deploy.adapter import save_adapter as save_adapter
    from lora_deploy.compare import compare_precisions as compare_precisions
    from lora_deploy.config import LoraConfig as LoraConfig
    from lora_deploy.export import export_onnx as export_onnx
    from lora_deploy.layers import LoraLinear as LoraLinear
    from lora_deploy.layers import get_lora_model as get_lora_model
    from lora_deploy.quantization import load_base_model as load_base_model
    from lora_deploy.quantization import quantize_model as quantize_model
    from lora_deploy.run import OnnxClassifier as OnnxClassifier
    from lora_deploy.run import OnnxModel as OnnxModel
    from lora_deploy.run import OnnxTokenClassifier as OnnxTokenClassifier
    from lora_deploy.verify import verify as verify
    from lora_deploy.verify import verify_module as verify_module

__version__ = "0.1.0"

_HOMES = {
    "LoraConfig": "config",
    "LoraLinear": "layers",
    "OnnxClassifier": "run",
    "OnnxModel": "run",
    "OnnxTokenClassifier": "run",
    "compare_precisions": "compare",
    "export_onnx": "export",
    "get_lora_model": "layers",
    "load_adapter": "adapter",
    "load_base_model": "quantization",
    "quantize_model": "quantization",
    "save_adapter": "adapter",
    "verify": "verify",
    "verify_module": "verify",
}

__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
