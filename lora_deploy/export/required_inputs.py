"""A graph whose optional inputs are required ones, for clients that only feed what a graph asks for.

onnxruntime calls an input that is an initializer too an overridable initializer and does not list it among the inputs.
Its JavaScript knows only what is listed (1.30): onnxruntime-node drops what it is given under such a name without a
word, so that every adapter would answer as the bare base, and onnxruntime-web refuses it ("invalid input").
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx

__all__ = ["require_inputs"]


def require_inputs(model: onnx.ModelProto) -> list[str]:
    """Make every optional input of a graph one that each run must be given, in place.

    Only the graph is needed, without its weights: `onnx.load(file, load_external_data=False)`. The bare base is then
    asked for explicitly: A and B of a slot (K, 0) and (0, N), or zeros of any other rank; `adapter_ids` (batch,) of -1.
    The seal in the metadata is that of the graph before.

    Args:
        model: Of IR version 4 or later, in which an initializer need not be an input.

    Returns:
        Their names, in the order of the graph's inputs.
    """
    graph = model.graph
    kept = {tensor.name for tensor in graph.initializer}
    optional = [value.name for value in graph.input if value.name in kept]
    names = set(optional)
    for place in reversed(range(len(graph.initializer))):
        if graph.initializer[place].name in names:
            del graph.initializer[place]
    return optional
