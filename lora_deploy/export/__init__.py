"""Export: a base and an adapter become an ONNX model."""

from lora_deploy.export.export import ExportResult, export_onnx
from lora_deploy.export.plan import ExportPlan, plan_export

__all__ = ["ExportPlan", "ExportResult", "export_onnx", "plan_export"]
