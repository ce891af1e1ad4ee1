"""The ONNX graph without weights, and how the checkpoint's parameters map to its initializers.

The only module that imports mobius.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from transformers import PreTrainedConfig

from lora_deploy.errors import CheckpointError
from lora_deploy.export.corrections import correct_graph

__all__ = ["Graph", "Segment", "WeightSource", "as_unsupported", "build_graph", "check_sources", "quiet"]

# mobius' names of the types that a graph can compute in.
_DTYPES = {"fp32": "f32", "fp16": "f16", "bf16": "bf16"}
# mobius' own graph for WebGPU can be captured: its cache has a fixed place. That of this graph grows.
_OPTIONS = {"webgpu": {"enableGraphCapture": "0", "validationMode": "basic"}}


@dataclass(frozen=True)
class Segment:
    """Consecutive rows of an initializer that come from one parameter.

    Attributes:
        parameter: Name in the transformers model.
        rows: Which rows of the parameter, seen as (out, in), in order.
    """

    parameter: str
    rows: range | tuple[int, ...]


@dataclass(frozen=True)
class WeightSource:
    """Where the values of an initializer come from.

    Attributes:
        segments: Its rows, in order.
        transposed: Whether the checkpoint stores the parameter as (in, out), as Conv1D does.
    """

    segments: tuple[Segment, ...]
    transposed: bool = False


@dataclass(frozen=True)
class Graph:
    """A graph whose weights are still to come.

    Attributes:
        model: The graph; initializers that wait for a weight have no value.
        sources: Where each of them gets it, by name of the initializer.
        genai_config: What onnxruntime-genai needs to know of the model, as a dict; empty for one that it cannot run.
    """

    model: ir.Model
    sources: dict[str, WeightSource]
    genai_config: dict[str, Any]


def build_graph(
    config: PreTrainedConfig, shapes: dict[str, tuple[int, ...]], *, precision: str, provider: str, file: str | Path
) -> Graph:
    """Build the graph of a causal language model with a key-value cache.

    The graph is mobius' "default" one, with ONNX's own Attention operator, for every provider: the ones with
    GroupQueryAttention compute wrong logits on left-padded batches (`attention.py` makes one that does not).

    Args:
        config: The model's configuration, without quantization.
        shapes: Shape of each parameter of the transformers model; tied ones once.
        precision: "fp32", "fp16" or "bf16".
        provider: The execution provider that onnxruntime-genai is told to use.
        file: The configuration's file, for messages.

    Returns:
        The graph, with every initializer that is not constant traced to the parameters it is made of.

    Raises:
        CheckpointError: The kind of model is not known, or the graph leaves a parameter of the model out.
    """
    import mobius
    from mobius._registry import registry

    model_type = config.model_type
    if model_type not in registry:
        raise CheckpointError(
            "no graph can be built for this kind of model",
            file=file,
            tensor="model_type",
            found=model_type,
            expected="a model type that mobius-onnx knows",
        )
    with tempfile.TemporaryDirectory() as directory, quiet("mobius"), as_unsupported(model_type, file):
        config.save_pretrained(directory)
        module_class = registry.get(model_type)
        package = mobius.build(
            directory,
            dtype=_DTYPES[precision],
            execution_provider="default",
            load_weights=False,
            module_class=module_class,
        )
    model: ir.Model = package["model"]
    with as_unsupported(model_type, file):
        correct_graph(model, config)
    model.graph.name = model_type  # mobius puts the temporary directory here
    waiting = {name for name, value in model.graph.initializers.items() if value.const_value is None}
    with as_unsupported(model_type, file):
        sources = _trace_sources(module_class(package.config), shapes, file)
    check_sources(model, waiting, sources, shapes, file)
    return Graph(
        model=model,
        sources={name: sources[name] for name in model.graph.initializers if name in waiting},
        genai_config=_genai_config(package.config, config, provider),
    )


@contextmanager
def as_unsupported(model_type: str, file: str | Path, remedy: str | None = None) -> Iterator[None]:
    """Whatever a source of graphs raises, as a CheckpointError: mobius' and torch's exceptions have no common base."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(
            "no graph can be built for this model",
            file=file,
            tensor=f"model_type {model_type}",
            found=_first_cause(error),
            remedy=remedy,
        ) from error


def _first_cause(error: BaseException) -> str:
    """torch's exporter wraps what went wrong in pages of advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]


@contextmanager
def quiet(logger: str) -> Iterator[None]:
    """Let a library log errors only."""
    level = logging.getLogger(logger).level
    logging.getLogger(logger).setLevel(logging.ERROR)
    try:
        yield
    finally:
        logging.getLogger(logger).setLevel(level)


def _trace_sources(module: Any, shapes: dict[str, tuple[int, ...]], file: str | Path) -> dict[str, WeightSource]:
    """Find out what the model class does to a checkpoint by running it on indices in the place of weights.

    `preprocess_weights` renames, splits, joins and transposes tensors. Three runs (which parameter, which row, which
    column) show where every element goes, without a special case for any architecture and, since the indices are
    broadcast views, without memory.
    """
    names = sorted(shapes)
    runs = [_preprocess(module, names, shapes, kind) for kind in ("parameter", "row", "column")]
    sources = {}
    for target in runs[0]:
        which, rows, columns = (run[target] for run in runs)
        source = _read_source(names, shapes, which, rows, columns)
        if source is None:
            raise CheckpointError(
                "the graph's source changes a weight in a way that is more than renaming, splitting and transposing",
                file=file,
                tensor=target,
            )
        sources[target] = source
    return sources


# Spread out and shifted, so that arithmetic on an index shows: a sum, a multiple or a zero is no index of anything.
_STRIDE, _SHIFT = 1009, 7


def _preprocess(
    module: Any, names: list[str], shapes: dict[str, tuple[int, ...]], kind: str
) -> dict[str, torch.Tensor]:
    state = {}
    for number, name in enumerate(names):
        shape = shapes[name]
        if kind == "parameter" or not shape:
            index = torch.tensor(number + 1)
        elif kind == "row":
            index = (torch.arange(shape[0]) + 1).view(-1, *[1] * (len(shape) - 1))
        else:
            index = torch.arange(shape[-1]) + 1
        state[name] = (index * _STRIDE + _SHIFT).expand(shape)
    if hasattr(module, "preprocess_weights"):
        state = module.preprocess_weights(state)
    return state


def _read_source(
    names: list[str],
    shapes: dict[str, tuple[int, ...]],
    which: torch.Tensor,
    rows: torch.Tensor,
    columns: torch.Tensor,
) -> WeightSource | None:
    """What the three index tensors of one initializer say; None where they are no plain row map."""
    shape = tuple(which.shape)
    parameters, by_row = _line(which, 0, shape), _line(rows, 0, shape)
    transposed = False
    if len(shape) == 2:
        straight = by_row is not None and _counts_up(_line(columns, 1, shape))
        if not straight:
            transposed = True
            by_row = _line(columns, 0, shape)
            if not _counts_up(_line(rows, 1, shape)):
                return None
    if parameters is None or by_row is None or len(shape) > 2:
        return None
    segments: list[Segment] = []
    numbers, lengths = torch.unique_consecutive(parameters, return_counts=True)
    start = 0
    for number, length in zip(numbers.tolist(), lengths.tolist(), strict=True):
        taken = by_row[start : start + length].tolist()
        start += length
        whole = range(taken[0], taken[0] + length)
        segments.append(Segment(names[number], whole if list(whole) == taken else tuple(taken)))
    origins = [shapes[segment.parameter] for segment in segments]
    reshaped = any(len(origin) != len(shape) for origin in origins)
    joined = len(shape) == 2 and any(origin[0 if transposed else 1] != shape[1] for origin in origins)
    return None if reshaped or joined else WeightSource(tuple(segments), transposed)


def _line(index: torch.Tensor, dim: int, shape: tuple[int, ...]) -> torch.Tensor | None:
    """The indices along one dimension, if they are indices and do not change along the others; else None."""
    for other, stride in enumerate(index.stride()):
        if stride == 0:  # a broadcast dimension: one element stands for all
            index = index.narrow(other, 0, 1)
    if index.is_floating_point() or bool((index % _STRIDE != _SHIFT).any()):
        return None
    index = index // _STRIDE - 1
    if index.ndim == 0:
        return index.reshape(1)
    across = index.movedim(dim, 0).reshape(index.shape[dim], -1)
    if not bool((across == across[:, :1]).all()):
        return None
    return across[:, 0].expand(shape[dim])


def _counts_up(line: torch.Tensor | None) -> bool:
    return line is not None and bool((line == torch.arange(line.numel())).all())


def check_sources(
    model: ir.Model,
    waiting: set[str],
    sources: dict[str, WeightSource],
    shapes: dict[str, tuple[int, ...]],
    file: str | Path,
) -> None:
    """Nothing of the graph may stay without a value, and nothing of the model may be left out."""
    for name in sorted(waiting - set(sources)):
        raise CheckpointError("the graph needs a weight that the model does not have", file=file, tensor=name)
    used = {segment.parameter for name in waiting for segment in sources[name].segments}
    for name in sorted(set(shapes) - used):
        raise CheckpointError(
            "the graph of this model leaves one of its weights out, so it would not compute what was trained",
            file=file,
            tensor=name,
            found=f"no initializer of the {model.graph.name} graph reads it",
            remedy="this model cannot be exported yet; please open an issue with its config.json",
        )


def _genai_config(graph_config: Any, config: PreTrainedConfig, provider: str) -> dict[str, Any]:
    from mobius.integrations.ort_genai import GenaiConfigGenerator

    generated: dict[str, Any] = GenaiConfigGenerator.from_config(
        graph_config,
        config.model_type,
        ep=provider,
        context_length=1,  # raised to the model's own
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
        supports_in_place_kv_cache=False,
    ).generate()
    generated["search"] |= {"do_sample": False}
    for options in generated["model"]["decoder"]["session_options"]["provider_options"]:
        if provider in _OPTIONS:
            options[provider] |= _OPTIONS[provider]
    return json.loads(json.dumps(generated))  # type: ignore[no-any-return]
