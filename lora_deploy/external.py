"""Weights beside a graph, read although their file has another name too.

onnx_ir refuses a file of several links in the directory of a model, lest one be a link to something secret. Those of an
export have them: while the export that gave its base is still there, in a backup made of links, or where a tool has
put equal files together. What leads out of the directory is refused as before.
"""

from __future__ import annotations

import os

import onnx_ir as ir

__all__ = ["readable"]


def readable(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    """The same tensor, to be read.

    Args:
        tensor: Of a graph; one whose file is not in the graph's own directory stays what onnx_ir refuses.
    """
    if not isinstance(tensor, ir.ExternalTensor):
        return tensor
    place = os.path.realpath(tensor.path)
    if os.path.dirname(place) != os.path.realpath(tensor.base_dir):
        return tensor
    name = str(tensor.name)
    return ir.ExternalTensor(place, tensor.offset, tensor.length, tensor.dtype, shape=tensor.shape, name=name)
