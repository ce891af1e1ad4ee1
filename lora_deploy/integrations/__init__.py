"""Inside the tools that train and export: transformers' Trainer and exporters, PEFT's models, optimum's command."""

from lora_deploy.integrations.callback import ExportCallback
from lora_deploy.integrations.trained import save_trained

__all__ = ["ExportCallback", "save_trained"]
