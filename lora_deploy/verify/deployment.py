"""How far the deployed weights are from the trained ones: on texts, and in the direction of the adapter's update."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedModel

from lora_deploy.adapter import LoraAdapter
from lora_deploy.adapter.packing import deployed_adapter
from lora_deploy.entries import recorded_calibration
from lora_deploy.export.merge import MergedParameters
from lora_deploy.layers.model import adapted_layers
from lora_deploy.manifest import read_metadata
from lora_deploy.places import find_place
from lora_deploy.quantization.base import TrainingBase
from lora_deploy.requantize.text import HELD_OUT, Text, pick_text
from lora_deploy.task import is_classification
from lora_deploy.verify.batches import Batch, make_batches
from lora_deploy.verify.deployed import DeployedWeights, load_deployed_twin
from lora_deploy.verify.deployment_report import DeploymentResult
from lora_deploy.verify.layers import errors_by_layer, run_unpadded
from lora_deploy.verify.metrics import compare_logits
from lora_deploy.verify.reference import apply_live, compute_class_logits, compute_logits, load_twin
from lora_deploy.verify.texts import Logits, TextResult, compare_on_text

__all__ = ["DeploymentResult", "held_out_texts", "measure_deployment"]

_ROWS, _OWN = 14, 8  # of all texts together, and of the task: answers are short
_FLOAT_BITS = {"fp32": 32, "fp16": 16, "bf16": 16}


def held_out_texts(
    directory: Path, base: TrainingBase, data: Path | None, training_data: Sequence[str | None]
) -> list[Text]:
    """Texts to measure a deployment on, without the rows that its rounding was calibrated on.

    Args:
        directory: The export.
        base: The training base.
        data: A JSONL file to take in the place of the training data; None to look for that.
        training_data: The files that training recorded.

    Returns:
        None of them for a classifier, whose texts have no successors to predict.

    Raises:
        DataError: `data` cannot be read.
    """
    if base.task != "causal-lm":
        return []
    taken = recorded_calibration(read_metadata(directory), directory / "model.onnx")
    known = [file for file in training_data if file is not None and Path(file).is_file()]
    return pick_text(
        base,
        data,
        known or [str(place) for place in map(find_place, taken) if place is not None],
        _ROWS,
        own=_OWN,
        general=HELD_OUT,
        taken=taken,
    )


def measure_deployment(
    directory: str | Path | DeployedWeights,
    base: TrainingBase,
    adapter: LoraAdapter | None,
    texts: Sequence[Text],
    *,
    deployed: PreTrainedModel | None = None,
) -> DeploymentResult:
    """Compare the weights that an export holds with those that were trained, both in float32 PyTorch.

    Args:
        directory: The export, or its weights, if they have been opened.
        base: The training base.
        adapter: The adapter; None for an export of the base alone.
        texts: To compare on, where both are given the same tokens. None for a classifier, which is compared on the
            batches of the parity check.
        deployed: What `load_deployed_twin` gives, if it has been loaded.
    """
    weights = directory if isinstance(directory, DeployedWeights) else DeployedWeights(Path(directory))
    layers, survives = _survival(weights, base, adapter)
    twin = load_deployed_twin(weights, base, adapter) if deployed is None else deployed
    trained = load_twin(base) if adapter is None else apply_live(load_twin(base), adapter)
    cache_errors: list[float] = []
    if is_classification(base.task):
        results = [_compare_classes(trained, twin, batch) for batch in make_batches(base)]
    else:
        without = _without_update(trained) if adapter is not None else None
        results = [compare_on_text(text, _logits(trained), _logits(twin), without) for text in texts]
        batches = make_batches(base)
        errors = errors_by_layer(run_unpadded(trained, batches).layers, run_unpadded(twin, batches).layers)
        cache_errors = errors or []
    return DeploymentResult(
        texts=results,
        bits=_stored_bits(weights, base),
        survives=survives,
        layers=layers,
        cache_errors=cache_errors,
    )


def _logits(model: PreTrainedModel) -> Logits:
    return lambda ids, mask: compute_logits(model, ids, mask)


def _without_update(model: PreTrainedModel) -> Logits:
    def logits(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        with _update_off(model):
            return compute_logits(model, ids, mask)

    return logits


@contextmanager
def _update_off(model: PreTrainedModel) -> Iterator[None]:
    """For a moment, no layer has its low-rank update."""
    layers = adapted_layers(model).values()
    try:
        for layer in layers:
            layer.active = False
        yield
    finally:
        for layer in layers:
            layer.active = True


def _compare_classes(trained: PreTrainedModel, deployed: PreTrainedModel, batch: Batch) -> TextResult:
    def logits(model: PreTrainedModel) -> torch.Tensor:
        return compute_class_logits(model, batch.input_ids, batch.attention_mask)

    _, _, everything = batch.phases()[0]
    reference = logits(trained)
    found = compare_logits(reference, logits(deployed), everything, tie_margin=0.0)
    base_kl = None
    if adapted_layers(trained):
        with _update_off(trained):
            base_kl = compare_logits(reference, logits(trained), everything, tie_margin=0.0).mean_kl
    return TextResult(name=batch.name, tokens=found.tokens, kl=found.mean_kl, top1=found.top1, base_kl=base_kl)


def _survival(
    weights: DeployedWeights, base: TrainingBase, adapter: LoraAdapter | None
) -> tuple[dict[str, float], float | None]:
    """<W_deployed - W_base, dW> / <dW, dW> of each layer and table that the adapter updates, and of all together."""
    if adapter is None:
        return {}, None
    running = deployed_adapter(adapter, weights.manifest.slots)
    own = MergedParameters(base, replace(adapter, updates={}))
    layers, kept, whole = {}, 0.0, 0.0
    for name, update in adapter.updates.items():
        is_conv1d = name in base.linears and base.linears[name].is_conv1d
        read_base = partial(own.read, f"{name}.weight", transposed=is_conv1d)
        delta = update.change(read_base)
        moved = torch.zeros_like(delta)
        if name in weights.modules:
            moved += weights.read(name) - read_base().float()
        if not (weights.is_merged and name in weights.modules):  # beside the weight, or merged into one in floats
            moved += running.updates[name].change(read_base)
        found, expected = float((moved * delta).sum()), float(delta.square().sum())
        kept, whole = kept + found, whole + expected
        layers[name] = found / expected if expected else 1.0
    alone = MergedParameters(base, None)
    for name, change in adapter.tables.items():
        table = alone.read(f"{name}.weight").float()
        delta = change.change_table(table.clone()).sub_(table)
        moved = weights.read(name) - table if name in weights.modules else delta
        found, expected = float((moved * delta).sum()), float(delta.square().sum())
        kept, whole = kept + found, whole + expected
        layers[name] = found / expected if expected else 1.0
    return layers, kept / whole if whole else None


def _stored_bits(weights: DeployedWeights, base: TrainingBase) -> float:
    """Mean bits of a weight of the linear layers, apart from the output head."""
    linears = {name for name in base.linears if name not in base.heads}
    count = {name: base.linears[name].shape[0] * base.linears[name].shape[1] for name in linears}
    spent, coded = 0, set()
    for weight in weights.manifest.coded:
        names = {module.name for module in weight.modules}
        if names <= linears:
            spent += 8 * (_bytes(weights, weight.codes) + _bytes(weights, weight.scales))
            coded |= names
    spent += 8 * sum(_bytes(weights, name) for slot in weights.manifest.correction for name in slot.input_names)
    spent += _FLOAT_BITS[weights.manifest.compute_dtype] * sum(count[name] for name in linears - coded)
    return spent / sum(count.values())


def _bytes(weights: DeployedWeights, initializer: str) -> int:
    tensor = weights.model.graph.initializers[initializer].const_value
    assert tensor is not None
    return tensor.nbytes
