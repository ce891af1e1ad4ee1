"""A graph whose products run in lora-deploy's own kernels.

The exported file stays as it is; only the graph that onnxruntime is given differs. It is changed as protobuf has it,
for the library that `lora_deploy.run.weights` uses takes as long to be imported as a small model takes to be opened.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_deploy.errors import UsageError
from lora_deploy.graph_check import metadata_of, read_graph
from lora_deploy.manifest import CodedWeight, Manifest
from lora_deploy.run.session import import_onnxruntime

__all__ = ["NativeWeights"]

_DOMAIN = "lora_deploy"


class NativeWeights:
    """A graph with lora-deploy's own operators for the products that they can compute: 4-bit codes, and LLM.int8.

    Args:
        file: `model.onnx`.
        options: The session options; get the library, and int8 codes as the operator reads them.

    Attributes:
        graph: To be opened from memory.

    Raises:
        UsageError: The kernels cannot be compiled here, or the graph has none of these products.
        CheckpointError: The graph is damaged or hostile.
    """

    def __init__(self, file: Path, options: Any) -> None:
        from lora_deploy.native import load_kernels

        model = read_graph(file)
        manifest = Manifest.read(metadata_of(model, file), file)
        usable = [weight for weight in manifest.coded if _has_kernel(weight)]
        if not usable or manifest.compute_dtype != "fp32":
            raise UsageError(
                "the native kernels are for weights in nf4, fp4 or LLM.int8, computed in float32",
                found=f"{manifest.precision} weights, computed in {manifest.compute_dtype}",
                expected="an export with --branch of a quantized base, without --expand, for the CPU",
            )
        options.register_custom_ops_library(str(load_kernels()))
        products = {node.output[0]: node for node in model.graph.node if node.output}
        stored = {tensor.name: tensor for tensor in model.graph.initializer}
        self._given: dict[str, Any] = {}
        for weight in usable:
            node = products[weight.output]
            node.domain = _DOMAIN
            if weight.operator == "MatMulNBits":
                node.op_type = "MatMulInt8"
                for place, array in enumerate(_rows_of_int8(weight, stored, file), start=1):
                    self._give(model, node, place, f"{weight.output}.{('codes', 'scales')[place - 1]}", array, file)
        for name, value in self._given.items():
            options.add_initializer(name, value)
        model.opset_import.add(domain=_DOMAIN, version=1)
        self.graph = bytes(model.SerializeToString())

    def _give(self, model: Any, node: Any, place: int, name: str, array: NDArray[Any], file: Path) -> None:
        """Let an input of a node be an array, and take out what it was, if nothing else reads it."""
        from onnx import TensorProto, helper

        replaced, node.input[place] = node.input[place], name
        tensor = model.graph.initializer.add(
            name=name,
            dims=array.shape,
            data_type=helper.np_dtype_to_tensor_dtype(array.dtype),
            data_location=TensorProto.EXTERNAL,
        )
        # onnxruntime is given the values. It only looks whether the file is there that they would be read from.
        for key, value in (("location", file.name), ("offset", "0"), ("length", str(array.nbytes))):
            tensor.external_data.add(key=key, value=value)
        self._given[name] = import_onnxruntime().OrtValue.ortvalue_from_numpy(array)
        if not any(replaced in other.input for other in model.graph.node):
            number = next(i for i, other in enumerate(model.graph.initializer) if other.name == replaced)
            del model.graph.initializer[number]


def _has_kernel(weight: CodedWeight) -> bool:
    return weight.operator == "MatMulBnb4" or (weight.operator == "MatMulNBits" and weight.exact)


def _rows_of_int8(weight: CodedWeight, stored: dict[str, Any], file: Path) -> tuple[NDArray[np.int8], NDArray[Any]]:
    """MatMulNBits' codes, blocks of code + 128, as int8 (out, in), and one scale a row."""
    from onnx import TensorProto, numpy_helper

    rows, columns = weight.shape
    arrays = []
    for name in (weight.codes, weight.scales):
        tensor = TensorProto()  # a copy, for onnx leaves the values in it
        tensor.CopyFrom(stored[name])
        arrays.append(numpy_helper.to_array(tensor, str(file.parent)).reshape(rows, -1))
    signed = (arrays[0][:, :columns] ^ 0x80).view(np.int8)
    return np.ascontiguousarray(signed), np.ascontiguousarray(arrays[1][:, 0])
