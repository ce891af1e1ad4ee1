"""Weights beside a graph, read although their file has another name too.

onnx_ir refuses a file of several links in the directory of a model, lest one be a link to something secret. Those of an
export have them: while the export that gave its base is still there, in a backup made of links, or where a tool has
put equal files together. Where the values may be, `lora_deploy.graph_check` looks at.
"""

from __future__ import annotations

import os

import onnx_ir as ir

__all__ = ["readable"]


def readable(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    """The same tensor, to be read.

    Args:
        tensor: Of a graph that `read_graph` has held to its own directory.
    """
    if not isinstance(tensor, ir.ExternalTensor):
        return tensor
    assert tensor.length is not None or tensor.offset is None
    return ir.ExternalTensor(
        os.path.abspath(tensor.path),
        tensor.offset,
        tensor.length,
        tensor.dtype,
        shape=tensor.shape,
        name=str(tensor.name),
    )
