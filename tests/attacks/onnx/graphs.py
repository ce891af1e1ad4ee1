"""Graphs with one lie each."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from onnx import FunctionProto, ModelProto, NodeProto, TensorProto, helper

from tests.attacks.onnx.make import ALL, DATA, RUN, Case, external, honest, inline

_CACHE = "past_key_values.0.key"


def cases() -> dict[str, Case]:
    """Every graph, by name."""
    found = {name: Case(_head(tensor), does, ALL) for name, (tensor, does) in _tensors().items()}
    found |= {name: Case(_changed(change), does, ALL) for name, (change, does) in _structures().items()}
    found |= {name: Case(_changed(change), does, (RUN,)) for name, (change, does) in _interfaces().items()}
    return found | _bytes()


def _head(tensor: TensorProto) -> bytes:
    def put(model: ModelProto) -> None:
        model.graph.initializer[1].CopyFrom(tensor)

    return _changed(put)


def _changed(change: Callable[[ModelProto], object]) -> bytes:
    model = honest()
    change(model)
    return bytes(model.SerializeToString())


def _tensors() -> dict[str, tuple[TensorProto, str]]:
    """What can be wrong with the head's values."""
    strings = external("head", DATA)
    strings.data_type = TensorProto.STRING
    values = b"\0" * 4160
    return {
        "location_parent": (external("head", "../secret.bin"), "reads a file beside the export's directory"),
        "location_absolute": (external("head", "/etc/passwd", length=None), "reads any file of the machine"),
        "location_link": (external("head", "link.data"), "reads through a link out of the directory"),
        "location_folder_link": (external("head", "folder/secret.bin"), "reads through a linked folder"),
        "location_backslash": (external("head", "..\\secret.bin"), "the same, as Windows writes it"),
        "location_device": (external("head", "/dev/zero"), "reads a device that never ends"),
        "location_fifo": (external("head", "fifo.data"), "waits for a pipe that nobody writes to"),
        "location_directory": (external("head", "."), "reads a directory"),
        "location_itself": (external("head", "model.onnx"), "takes the graph's own bytes for weights"),
        "location_nul": (external("head", f"{DATA}\0.txt"), "a name that ends earlier in C than in Python"),
        "location_empty": (external("head", ""), "no name"),
        "location_none": (external("head", None), "no entry for the name"),
        "location_missing": (external("head", "nothing.data"), "weights that are not there"),
        "location_memory": (external("head", "*/_ORT_MEM_ADDR_/*", offset=4096), "an address in onnxruntime's memory"),
        "location_not_utf8": (_not_utf8(), "a name that is no text"),
        "offset_beyond": (external("head", DATA, offset=8000), "reads past the end of the file"),
        "offset_negative": (external("head", DATA, offset=-64), "reads before its beginning"),
        "offset_overflow": (external("head", DATA, offset=2**63 - 32), "an end that overflows 64 bits"),
        "offset_wraps": (external("head", DATA, offset=2**64 - 32), "an offset that wraps to a negative one"),
        "offset_text": (external("head", DATA, offset="1e3"), "no whole number"),
        "length_negative": (external("head", DATA, length=-4160), "less than nothing"),
        "length_short": (external("head", DATA, offset=4160, length=64), "fewer bytes than the shape needs"),
        "length_long": (external("head", DATA, length=8320), "more bytes than the shape needs"),
        "length_beyond": (external("head", DATA, length=1 << 40, dims=(4, 1 << 36)), "a terabyte of a small file"),
        "external_dims_overflow": (external("head", DATA, length=0, dims=(1 << 62, 4)), "a product that wraps to 0"),
        "external_strings": (strings, "texts, for which there is no such format"),
        "raw_short": (inline("head", (4, 260), values[:64]), "fewer bytes than the shape needs, inline"),
        "raw_long": (inline("head", (4, 260), values + b"\0"), "a byte too many"),
        "dims_negative": (inline("head", (-4, -260), values), "two negative sizes, whose product is right"),
        "dims_giant": (inline("head", (1 << 40, 1 << 40)), "more values than there are addresses"),
        "dims_zero_times_giant": (inline("head", (0, 1 << 62)), "no values, of an absurd width"),
        "values_missing": (
            TensorProto(name="head", data_type=TensorProto.INT32, dims=(50000, 50000)),
            "ten gigabytes of nothing",
        ),
        "values_packed_short": (inline("head", (4, 260), values[:64], TensorProto.INT4), "4-bit values, too few"),
        "type_unknown": (inline("head", (4, 260), values, 999), "a type that there is not"),
        "type_none": (inline("head", (4, 260), values, 0), "no type"),
        "name_twice": (inline("table", (4, 260), values), "two tensors of one name"),
    }


def _not_utf8() -> TensorProto:
    tensor = external("head", "ab.data")
    return TensorProto.FromString(tensor.SerializeToString().replace(b"ab.data", b"\xff\xfe.data"))


def _structures() -> dict[str, tuple[Callable[[ModelProto], object], str]]:
    """Lies that are further inside, and graphs without end."""
    hidden = external("value", "../secret.bin")

    def add(node: NodeProto) -> Callable[[ModelProto], object]:
        return lambda model: model.graph.node.insert(0, node)

    def in_function(model: ModelProto) -> None:
        constant = helper.make_node("Constant", [], ["y"], value=hidden)
        model.functions.append(_function("F", [constant, helper.make_node("Add", ["a", "y"], ["b"])]))
        _call(model, "F")

    def sparse(model: ModelProto) -> None:
        one = model.graph.sparse_initializer.add()
        one.values.CopyFrom(hidden)
        one.indices.CopyFrom(inline("indices", (1,), np.zeros(1, np.int64).tobytes(), TensorProto.INT64))
        one.dims.extend((4, 260))

    def recursive(model: ModelProto) -> None:
        model.functions.append(_function("F", [helper.make_node("F", ["a"], ["b"], domain="d")]))
        _call(model, "F")

    def doubling(model: ModelProto) -> None:
        for number in range(40):
            inner = [helper.make_node(f"F{number + 1}", [x], [y], domain="d") for x, y in (("a", "m"), ("m", "b"))]
            model.functions.append(_function(f"F{number}", inner))
        model.functions.append(_function("F40", [helper.make_node("Identity", ["a"], ["b"])]))
        _call(model, "F0")

    branch = helper.make_graph([helper.make_node("Identity", ["value"], ["o"])], "g", [], [_bool("o")], [hidden])
    condition = helper.make_node("If", ["c"], ["unused"], then_branch=branch, else_branch=branch)
    return {
        "inside_constant": (add(helper.make_node("Constant", [], ["y"], value=hidden)), "hides it in a Constant"),
        "inside_branch": (add(condition), "hides it in a branch of an If"),
        "inside_function": (in_function, "hides it in a function"),
        "inside_sparse": (sparse, "hides it in a sparse tensor"),
        "functions_recursive": (recursive, "a function that calls itself"),
        "functions_doubling": (doubling, "forty functions, each calling the next one twice"),
        "input_giant": (
            lambda model: model.graph.input.append(_input("x", [1 << 30, 1 << 30])),
            "an input of 2^60 values",
        ),
        "input_negative": (lambda model: model.graph.input.append(_input("x", [-5, 4])), "an input of negative size"),
        "input_nameless": (lambda model: model.graph.input.append(_input("", [1])), "an input without a name"),
        "metadata_twice": (
            lambda model: model.metadata_props.add(key="lora_deploy.branch", value="fixed"),
            "says two things of itself",
        ),
    }


def _function(name: str, nodes: list[NodeProto]) -> FunctionProto:
    return helper.make_function(
        "d", name, ["a"], ["b"], nodes, [helper.make_opsetid("", 21), helper.make_opsetid("d", 1)]
    )


def _call(model: ModelProto, name: str) -> None:
    model.opset_import.append(helper.make_opsetid("d", 1))
    model.graph.node[0].output[0] = "before"
    model.graph.node.insert(1, helper.make_node(name, ["before"], ["x"], domain="d"))


def _bool(name: str):  # type: ignore[no-untyped-def]
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, None)


def _input(name: str, shape: list[int | str], data_type: int = TensorProto.FLOAT):  # type: ignore[no-untyped-def]
    return helper.make_tensor_value_info(name, data_type, shape)


def _interfaces() -> dict[str, tuple[Callable[[ModelProto], object], str]]:
    """Graphs that can be read, but not be run as a language model."""

    def cache(shape: list[int | str], data_type: int = TensorProto.FLOAT) -> Callable[[ModelProto], object]:
        return lambda model: model.graph.input.append(_input(_CACHE, shape, data_type))

    def logits(node: NodeProto, data_type: int = TensorProto.FLOAT) -> Callable[[ModelProto], object]:
        def put(model: ModelProto) -> None:
            model.graph.node[4].output[0] = "sum"
            model.graph.node.append(node)
            model.graph.output[0].CopyFrom(helper.make_tensor_value_info("logits", data_type, None))

        return put

    def sequence(model: ModelProto) -> None:
        logits(helper.make_node("SequenceConstruct", ["sum"], ["logits"]))(model)
        element = helper.make_tensor_type_proto(TensorProto.FLOAT, None)
        model.graph.output[0].type.CopyFrom(helper.make_sequence_type_proto(element))

    def reshape(model: ModelProto) -> None:
        model.graph.initializer.append(inline("shape", (1,), np.array([7], np.int64).tobytes(), TensorProto.INT64))
        logits(helper.make_node("Reshape", ["sum", "shape"], ["logits"]))(model)

    def bomb(model: ModelProto) -> None:
        size = inline("size", (2,), np.array([1 << 31, 1 << 31], np.int64).tobytes(), TensorProto.INT64)
        model.graph.initializer.append(size)
        model.graph.node.append(helper.make_node("ConstantOfShape", ["size"], ["much"]))
        model.graph.node.append(helper.make_node("ReduceSum", ["much"], ["one"], keepdims=0))
        logits(helper.make_node("Add", ["sum", "one"], ["logits"]))(model)

    def rename(model: ModelProto) -> None:
        model.graph.node[4].output[0] = model.graph.output[0].name = "other"

    def cycle(model: ModelProto) -> None:
        model.graph.node[3].input[0] = "update"

    cast = helper.make_node("Cast", ["sum"], ["logits"], to=TensorProto.INT64)
    return {
        "cache_giant": (cache(["batch", 1 << 14, "past", 1 << 14]), "a cache of a gigabyte a token"),
        "cache_flat": (cache(["batch", "past"]), "a cache without heads"),
        "cache_scalar": (cache([]), "a cache without a batch"),
        "cache_integers": (cache(["batch", 1, "past", 4], TensorProto.INT64), "a cache of whole numbers"),
        "input_unknown": (lambda model: model.graph.input.append(_input("x", ["n"])), "asks for what nobody has"),
        "logits_missing": (rename, "gives no logits"),
        "logits_scalar": (logits(helper.make_node("ReduceSum", ["sum"], ["logits"], keepdims=0)), "one number"),
        "logits_integers": (logits(cast, TensorProto.INT64), "whole numbers for logits"),
        "logits_sequence": (sequence, "a list for logits"),
        "operator_unknown": (logits(helper.make_node("Nope", ["sum"], ["logits"])), "an operator that there is not"),
        "operator_fails": (reshape, "a product that cannot be reshaped as it says"),
        "memory_bomb": (bomb, "2^62 values when it is run"),
        "no_nodes": (lambda model: model.graph.ClearField("node"), "a graph that computes nothing"),
        "cycle": (cycle, "a value that is made of itself"),
    }


def _bytes() -> dict[str, Case]:
    """What is no graph at all."""
    content = honest().SerializeToString()
    deep = b""
    for number in [1, 5, 6] * 500:  # a graph in an attribute of a node of a graph
        deep = bytes([number << 3 | 2]) + _varint(len(deep)) + deep
    no_text = content.replace(b"lora_deploy.provider", b"lora_deploy.p\xff\xfe\xfdder")
    return {
        "empty": Case(b"", "no byte", ALL),
        "garbage": Case(b"\xff" * 64, "no graph", ALL),
        "truncated": Case(content[:-200], "the end is missing", ALL),
        "no_graph": Case(b"\x08\x0a", "a model without a graph", ALL),
        "nested_too_deep": Case(b"\x08\x0a\x3a" + _varint(len(deep)) + deep, "500 graphs in each other", ALL),
        "metadata_not_utf8": Case(no_text, "metadata that is no text", ALL),
    }


def _varint(number: int) -> bytes:
    out = b""
    while number > 127:
        out, number = out + bytes([number & 127 | 128]), number >> 7
    return out + bytes([number])
