"""A bfloat16 export as a float32 one with the same weight values, to check it where no bfloat16 kernels are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir

from lora_deploy.external import readable

__all__ = ["write_float32_shadow"]

_BF16, _FP32 = ir.DataType.BFLOAT16, ir.DataType.FLOAT


def write_float32_shadow(export: Path, directory: Path) -> None:
    """Write the export's graph to another directory with every bfloat16 type and value turned into float32.

    Args:
        export: Directory of the bfloat16 export.
        directory: Where `model.onnx` goes. It takes twice the export's size.
    """
    model = ir.load(export / "model.onnx")
    for value in model.graph.initializers.values():
        if value.const_value is not None:
            value.const_value = readable(value.const_value)
            if value.dtype == _BF16:
                value.const_value = ir.Tensor(value.const_value.numpy().astype(np.float32), name=value.name)
    for node in model.graph.all_nodes():
        for name, attribute in list(node.attributes.items()):
            if attribute.type == ir.AttributeType.TENSOR and attribute.value.dtype == _BF16:
                node.attributes[name] = ir.AttrTensor(name, ir.Tensor(attribute.value.numpy().astype(np.float32)))
        if node.op_type == "Cast" and node.attributes["to"].value == _BF16:
            node.attributes["to"] = ir.AttrInt64("to", _FP32)
    values = [*model.graph.inputs, *model.graph.initializers.values()]
    values += [output for node in model.graph.all_nodes() for output in node.outputs]
    for value in values:
        if value.dtype == _BF16:
            value.type = ir.TensorType(_FP32)
    ir.save(model, directory / "model.onnx", external_data="model.onnx.data", size_threshold_bytes=1024)
