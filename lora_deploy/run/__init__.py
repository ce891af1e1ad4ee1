"""Run an export in onnxruntime."""

from lora_deploy.run.classify import OnnxClassifier, OnnxTokenClassifier
from lora_deploy.run.generate import OnnxModel
from lora_deploy.run.session import OnnxSession

__all__ = ["OnnxClassifier", "OnnxModel", "OnnxSession", "OnnxTokenClassifier"]
