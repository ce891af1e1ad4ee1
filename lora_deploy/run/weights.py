"""Other ways to run a graph whose weights are codes: dequantized when it is opened, or on activations as they are.

The exported file stays as it is; only the graph that onnxruntime is given differs.
"""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import RemoveUnusedNodesPass

from lora_deploy.codes import pair_table
from lora_deploy.errors import UsageError
from lora_deploy.external import readable
from lora_deploy.manifest import CodedWeight, Manifest
from lora_deploy.run.session import import_onnxruntime, numpy_dtype

__all__ = ["ExpandedWeights", "graph_at_level_0"]

_PRIVATE: dict[str, int] = {}
if hasattr(mmap, "MAP_PRIVATE"):
    _PRIVATE["flags"] = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
_PIECE = 1 << 20  # bytes of codes looked up in one go


class ExpandedWeights:
    """A graph with a float weight in the place of each coded one, and the memory that those weights are in.

    onnxruntime folds the operators of an export with --expand to the same values, but needs several copies on the way.

    Args:
        file: `model.onnx`.
        options: The session options; get the weights.

    Attributes:
        graph: To be opened from memory.
    """

    def __init__(self, file: Path, options: Any) -> None:
        model = ir.load(file)
        self.manifest = Manifest.read(model.metadata_props, file)
        if self.manifest.compute_dtype == "bf16":
            raise UsageError(
                "weights in bfloat16 cannot be expanded by lora-deploy",
                file=file,
                remedy="run them as they are stored; an export with --expand is folded by onnxruntime itself",
            )
        values = {output.name: output for node in model.graph for output in node.outputs}
        self._model = model
        self._arrays: dict[str, tuple[CodedWeight, mmap.mmap, NDArray[Any]]] = {}
        # Of their own, for the pass below takes codes that nothing reads any more out of the graph.
        self._initializers = dict(model.graph.initializers)
        for weight in self.manifest.coded:
            if weight.operator == "GatherBlockQuantized":
                continue  # a lookup reads a few rows only
            self._replace(values[weight.output], weight, file.name)
        self._given = {
            name: import_onnxruntime().OrtValue.ortvalue_from_numpy(array)
            for name, (_, _, array) in self._arrays.items()
        }
        if self.manifest.compute_dtype == "fp32":
            for name, value in self._given.items():
                options.add_initializer(name, value)
        elif self._given:
            # A CPU has no float16 product: onnxruntime turns the weights to float32 when it opens the graph, and would
            # take them from the placeholder's file. So it keeps this memory, which the float32 products do not need.
            options.add_external_initializers(list(self._given), list(self._given.values()))
        RemoveUnusedNodesPass()(model)
        self.graph = bytes(ir.to_proto(model).SerializeToString())

    def _replace(self, value: ir.Value, weight: CodedWeight, file_name: str) -> None:
        """Let a site multiply with its float weight, and fill that."""
        name = f"{weight.codes}.expanded"
        dtype = numpy_dtype(self.manifest.compute_dtype)
        rows, columns = weight.shape
        codes = self._initializers[weight.codes].const_value
        if codes is None or rows * columns > 2 * codes.nbytes:
            raise ValueError(f"{weight.codes} has not the {rows} x {columns} codes that the model says it has")
        # Private, where there is such a choice: pages of shared memory would stay, whatever `release` asks for.
        memory = mmap.mmap(-1, rows * columns * dtype.itemsize, **_PRIVATE)
        array = np.frombuffer(memory, dtype).reshape(rows, columns)
        self._arrays[name] = (weight, memory, array)
        self._fill(weight, array)
        initializer = _placeholder(name, array, file_name)
        self._model.graph.initializers[name] = initializer
        product = _product(value, weight)
        node = ir.node(
            "FusedMatMul", [product.inputs[0], initializer], attributes={"transB": 1}, domain="com.microsoft"
        )
        ir.convenience.replace_nodes_and_values(
            self._model.graph, product, [product], [node], product.outputs, node.outputs
        )

    def _fill(self, weight: CodedWeight, array: NDArray[Any]) -> None:
        codes, scales = (self._initializers[name].const_value for name in (weight.codes, weight.scales))
        assert codes is not None
        assert scales is not None
        array[...] = _dequantize(readable(codes).numpy(), readable(scales).numpy().astype(np.float32), weight)

    def release(self, session: Any) -> None:
        """Give back the memory of the weights, if the session has made its own copy of every one, as it does on a CPU.

        Its pages become zeros; if the session then computes something else than before, they are filled again. The
        addresses stay valid either way.

        Args:
            session: The open session.
        """
        if not hasattr(mmap, "MADV_DONTNEED") or not self._arrays:
            return
        feeds = _any_feeds(session)
        before = session.run(["logits"], feeds)[0]
        for _, memory, _ in self._arrays.values():
            memory.madvise(mmap.MADV_DONTNEED)
        if np.array_equal(before, session.run(["logits"], feeds)[0], equal_nan=True):
            return
        for weight, _, array in self._arrays.values():
            self._fill(weight, array)


def _any_feeds(session: Any) -> dict[str, NDArray[Any]]:
    """Two tokens and no past."""
    feeds: dict[str, NDArray[Any]] = {}
    for node in session.get_inputs():
        if node.name.startswith("past_key_values."):
            shape = [size if isinstance(size, int) else 0 for size in node.shape]
            dtype = np.float16 if node.type == "tensor(float16)" else np.float32
            feeds[node.name] = np.zeros((1, *shape[1:]), dtype)
        else:
            values = [1, 1] if node.name == "attention_mask" else [0, 1]
            feeds[node.name] = np.array([values], np.int64)
    return feeds


def graph_at_level_0(file: Path) -> bytes:
    """A graph whose MatMulNBits leave activations as they are, to be opened from memory; its weights stay in the file.

    Args:
        file: `model.onnx`.
    """
    model = ir.load(file)
    for node in model.graph.all_nodes():
        if node.op_type == "MatMulNBits" and "accuracy_level" in node.attributes:
            node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", 0)
    return bytes(ir.to_proto(model).SerializeToString())


def _placeholder(name: str, array: NDArray[Any], file_name: str) -> ir.Value:
    """An initializer whose values onnxruntime is given.

    It only looks whether the file is there that they would be read from.
    """
    dtype, shape = ir.DataType.from_numpy(array.dtype), ir.Shape(array.shape)
    tensor = ir.ExternalTensor(file_name, 0, array.nbytes, dtype, shape=shape, name=name)
    return ir.val(name, const_value=tensor)


def _product(value: ir.Value, weight: CodedWeight) -> ir.Node:
    """The node that multiplies."""
    node = value.producer()
    if weight.operator == "expand":
        (transpose,) = value.consumers()
        (node,) = transpose.outputs[0].consumers()
    assert node is not None
    return node


def _dequantize(codes: NDArray[Any], scales: NDArray[np.float32], weight: CodedWeight) -> NDArray[np.float32]:
    """float32 (out, in), the products of code and scale, as bitsandbytes has them."""
    rows, columns = weight.shape
    if weight.scheme == "int4":
        codes = np.stack([codes & 15, codes >> 4], axis=-1)
    if weight.scheme in ("int8", "int4"):
        if weight.operator == "expand":
            return codes.astype(np.float32) * scales
        blocks = codes.astype(np.float32).reshape(rows, -1, weight.blocksize)
        blocks -= 8 if weight.scheme == "int4" else 128
        blocks *= scales.reshape(rows, -1, 1)
        return blocks.reshape(rows, -1)[:, :columns]
    table = np.array(pair_table(weight.scheme), np.float32)
    codes, scales = codes.reshape(-1), scales.reshape(-1)
    pairs = np.empty((codes.size, 2), np.float32)
    for start in range(0, codes.size, _PIECE):
        np.take(table, codes[start : start + _PIECE], axis=0, out=pairs[start : start + _PIECE])
    flat = pairs.reshape(-1)[: rows * columns]
    whole = flat.size // weight.blocksize
    flat[: whole * weight.blocksize].reshape(-1, weight.blocksize)[...] *= scales[:whole, None]
    flat[whole * weight.blocksize :] *= scales[-1]
    return flat.reshape(rows, columns)
