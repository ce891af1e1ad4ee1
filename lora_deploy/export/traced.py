"""The graph of a classifier, traced by torch from transformers' own code. No weights are needed."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from lora_deploy.errors import CheckpointError
from lora_deploy.export.graph import Graph, Segment, WeightSource, as_unsupported, quiet
from lora_deploy.task import auto_class, find_task

__all__ = ["DTYPES", "finish_trace", "trace_graph", "trace_module", "unfilled_model"]

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# The first with Gelu.
_OPSET = 20
_EXAMPLE = (2, 8)  # (batch, sequence): neither 1, which torch would take for a constant


def trace_graph(config: PreTrainedConfig, *, precision: str, file: str | Path) -> Graph:
    """Trace the graph of a classifier, of sequences or of tokens, as the configuration's `architectures` says.

    Its inputs are `input_ids`, `attention_mask` and, for a model that tells two texts of a pair apart,
    `token_type_ids`, all int64 (batch, sequence); its output is `logits` (batch, labels) or (batch, sequence, labels).
    Linear layers are spelled Transpose(W) -> MatMul, as mobius spells them, so that the same pass finds them.

    Args:
        config: The model's configuration, without quantization.
        precision: "fp32", "fp16" or "bf16".
        file: The configuration's file, for messages.

    Returns:
        The graph. Initializers that hold a parameter wait for their values.

    Raises:
        CheckpointError: torch cannot trace the model for every batch and length.
    """
    with as_unsupported(config.model_type, file):
        model = unfilled_model(config, DTYPES[precision])
        inputs = _example_inputs(model)
        axes = {name: {0: "batch", 1: "sequence"} for name in inputs}
        traced = trace_module(model, inputs, axes, ["logits"])
    for value in (*traced.graph.inputs, *traced.graph.outputs):
        if value.shape is None or isinstance(value.shape[0], int):
            raise CheckpointError(
                "the traced graph is for one size of batch only", file=file, tensor=value.name, found=value.shape
            )
    return finish_trace(traced, config.model_type, model.state_dict())


def finish_trace(traced: ir.Model, name: str, parameters: Mapping[str, torch.Tensor]) -> Graph:
    """Make of what torch traced a graph whose weights are still to come, in place.

    Args:
        traced: From `trace_module`.
        name: Of the graph.
        parameters: The model's state: what of the initializers waits for its values.
    """
    traced.graph.name = name
    sources = _empty_parameters(traced, parameters)
    _simplify(traced)
    _strip_metadata(traced)
    _spell_out_linears(traced, sources)
    kept = {name: source for name, source in sources.items() if name in traced.graph.initializers}
    return Graph(traced, kept, genai_config={})


def unfilled_model(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model with memory that is never touched for its parameters, and with its real constants.

    On the meta device there would be no constants (tables of positions), which the graph holds. Measured on
    BERT-large (1.3 GB): 60 MB more after this, 170 MB after the trace.
    """
    config = copy.deepcopy(config)
    config.use_cache = False
    with no_init_weights():
        model: PreTrainedModel = auto_class(find_task(config.architectures)).from_config(
            config, attn_implementation="eager", dtype=dtype, trust_remote_code=False
        )
    model.train(False)
    return model


def _example_inputs(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    inputs = {"input_ids": torch.ones(_EXAMPLE, dtype=torch.int64)}
    inputs["attention_mask"] = torch.ones(_EXAMPLE, dtype=torch.int64)
    takes_types = "token_type_ids" in inspect.signature(model.forward).parameters
    if takes_types and getattr(model.config, "type_vocab_size", 0) > 1:
        inputs["token_type_ids"] = torch.zeros(_EXAMPLE, dtype=torch.int64)
    return inputs


def trace_module(
    model: nn.Module,
    inputs: Mapping[str, Any],
    axes: Mapping[str, Any],
    outputs: Sequence[str],
    *,
    input_names: Sequence[str] | None = None,
) -> ir.Model:
    """What torch.onnx.export makes of a module.

    Args:
        model: The module, in evaluation mode.
        inputs: An example of each, a tensor or a list of some, by the name of `forward`'s argument.
        axes: The dimensions of each that may have any size, with their names.
        outputs: Names of the outputs, in order.
        input_names: Names of the tensors among the inputs, in order; None for the arguments'.
    """
    with quiet("torch.onnx"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            model,
            (),
            kwargs=dict(inputs),
            dynamo=True,
            dynamic_shapes={name: axes.get(name, {}) for name in inputs},
            input_names=list(input_names or inputs),
            output_names=list(outputs),
            opset_version=_OPSET,
            optimize=False,  # it would fold what lies in the parameters' memory into the graph
            verbose=False,
        )
    assert program is not None
    return program.model


def _empty_parameters(model: ir.Model, parameters: Mapping[str, torch.Tensor]) -> dict[str, WeightSource]:
    """Let every initializer that is a parameter of the checkpoint wait for its values, in place."""
    sources = {}
    for name, value in model.graph.initializers.items():
        if name in parameters:
            value.const_value = None
            rows = range(parameters[name].shape[0] if parameters[name].ndim else 1)
            sources[name] = WeightSource((Segment(name, rows),))
    return sources


def _simplify(model: ir.Model) -> None:
    from onnxscript.optimizer import optimize

    with quiet("onnx_ir"), quiet("onnxscript"):
        optimize(model)


def _strip_metadata(model: ir.Model) -> None:
    """Drop what the exporter noted of values and the graph: it names files of this machine."""
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    values = [*model.graph.inputs, *model.graph.initializers.values()]
    for node in model.graph:
        node.metadata_props.clear()
        values += node.outputs
    for value in values:
        value.metadata_props.clear()


def _spell_out_linears(model: ir.Model, sources: dict[str, WeightSource]) -> None:
    """Turn every product with a parameter into Transpose(W) -> MatMul (-> Add), with W (out, in), in place."""
    for node in list(model.graph):
        is_gemm = node.op_type == "Gemm"
        if node.domain != "" or node.op_type not in ("Gemm", "MatMul"):
            continue
        x, weight = node.inputs[:2]
        if x is None or weight is None or weight.name not in sources or len(list(weight.uses())) > 1:
            continue
        if weight.shape is None or len(weight.shape) != 2:
            continue
        factors = [node.attributes.get_float(name, 1.0) for name in ("alpha", "beta")] if is_gemm else []
        if any(factor != 1.0 for factor in factors) or (is_gemm and node.attributes.get_int("transA")):
            continue
        if not (is_gemm and node.attributes.get_int("transB")):
            _turn(weight, sources)
        transpose = ir.node("Transpose", [weight], attributes={"perm": [1, 0]}, name=f"{weight.name}.transpose")
        nodes = [transpose, ir.node("MatMul", [x, transpose.outputs[0]], name=f"{weight.name}.product")]
        if len(node.inputs) > 2 and node.inputs[2] is not None:
            nodes.append(ir.node("Add", [nodes[-1].outputs[0], node.inputs[2]], name=f"{weight.name}.add"))
        ir.convenience.replace_nodes_and_values(
            model.graph, node, [node], nodes, [node.outputs[0]], [nodes[-1].outputs[0]]
        )


def _turn(weight: ir.Value, sources: dict[str, WeightSource]) -> None:
    """An initializer that is (in, out), as Conv1D keeps it, becomes (out, in)."""
    assert weight.shape is not None
    rows, columns = weight.shape.numpy()
    weight.shape = ir.Shape([columns, rows])
    name = str(weight.name)
    sources[name] = WeightSource((Segment(name, range(columns)),), transposed=True)
