"""A model in memory, in PEFT's layers or ours, becomes what export reads: an adapter's files and its base's record."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import nn

from lora_deploy.adapter import TrainingRecord, read_adapter, save_adapter
from lora_deploy.adapter.files import WEIGHTS_NAME
from lora_deploy.config import CONFIG_NAME
from lora_deploy.errors import AdapterError, CheckpointError, OutputError, UsageError
from lora_deploy.export.merge import open_base
from lora_deploy.layers.model import adapted_layers
from lora_deploy.quantization.base import TrainingBase
from lora_deploy.quantization.bnb import bitsandbytes as bnb
from lora_deploy.quantization.hashes import hash_codes
from lora_deploy.quantization.model import linear_modules, quantized_weight
from lora_deploy.quantization.scheme import QuantizationScheme
from lora_deploy.quantization.weight import Blockwise4BitWeight
from lora_deploy.versions import installed_versions

__all__ = ["save_trained", "write_adapter_of"]

_CODED = (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)
# Beginnings of the parts of names by which PEFT's layers and ours hold what is not of the base, or not used any more.
_ADDED = ("lora_", "modules_to_save", "original_module", "token_adapter", "trainable_tokens")
_ROUNDING = 0.01  # of the norm of a weight


def save_trained(model: nn.Module, directory: str | Path, base: str | Path | None = None) -> TrainingRecord:
    """Write the adapter of a model in memory, in PEFT's format, with the record of the base that it is trained on.

    Args:
        model: One that PEFT's `get_peft_model` or our `get_lora_model` returned.
        directory: Where to; `export_onnx` takes it as the adapter.
        base: The checkpoint that the base was loaded from: a directory or a hub id; None for what the model says.

    Returns:
        The record: the base, how it is quantized in memory, and the hash of its codes.

    Raises:
        AdapterError: The model has no adapter, or several.
        ConfigError: The adapter is of a kind that cannot be exported.
        CheckpointError: The checkpoint is missing, or is not what the model holds.
        UsageError: The model does not say where its base is.
        OutputError: It could not be written.
    """
    write_adapter_of(model, directory)
    plain = _without_wrapper(model)
    place = str(base or getattr(getattr(plain, "config", None), "_name_or_path", ""))
    if not place:
        raise UsageError(
            "the model does not say where its base was loaded from",
            expected="the directory or hub id that was given to from_pretrained",
            remedy="name it: base=...",
        )
    checkpoint = open_base(place, _scheme_of(plain), [read_adapter(directory, lazy=True)])
    _check_same(plain, checkpoint)
    record = TrainingRecord(
        base_model=str(Path(place).resolve()) if Path(place).is_dir() else place,
        quantization=checkpoint.scheme,
        base_sha256=checkpoint.sha256(),
        codes_sha256=hash_codes(plain),
        versions=installed_versions("lora-deploy", "torch", "transformers", "peft", "accelerate", "bitsandbytes"),
    )
    record.save(directory)
    return record


def write_adapter_of(model: nn.Module, directory: str | Path) -> None:
    """Write the adapter of a model in memory, in PEFT's format.

    Raises:
        AdapterError, ConfigError, OutputError: As `save_trained`.
    """
    directory = Path(directory)
    if adapted_layers(model):
        save_adapter(model, directory)
        return
    name = _peft_name(model)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        # Beside what is there, which may have a card or a directory of the adapter's name.
        with tempfile.TemporaryDirectory(dir=directory, prefix=".saving-") as scratch:
            model.save_pretrained(scratch, selected_adapters=[name])  # type: ignore[operator]
            saved = Path(scratch) if name == "default" else Path(scratch) / name
            for file in (CONFIG_NAME, WEIGHTS_NAME):
                (saved / file).replace(directory / file)
    except OSError as error:
        raise OutputError("the adapter could not be written", file=directory, found=str(error)) from error


def _peft_name(model: nn.Module) -> str:
    """The name of the one adapter that is active on a PEFT model."""
    if not _is_wrapped(model):
        raise AdapterError(
            "the model has no adapter",
            found=type(model).__name__,
            expected="a model of peft.get_peft_model or get_lora_model",
        )
    active = list(cast("list[str]", model.active_adapters))
    if len(active) != 1:
        raise AdapterError(
            "several adapters are active on the model",
            found=", ".join(active) or "none",
            expected="one",
            remedy="activate the one that is meant with set_adapter, or save each and name them to export_onnx",
        )
    return active[0]


def _is_wrapped(model: nn.Module) -> bool:
    """Whether the model is PEFT's wrapper around a model."""
    return any(kind.__module__.startswith("peft.") for kind in type(model).__mro__)


def _without_wrapper(model: nn.Module) -> nn.Module:
    return cast(nn.Module, model.get_base_model()) if _is_wrapped(model) else model  # type: ignore[operator]


def _scheme_of(model: nn.Module) -> QuantizationScheme:
    """How the linear layers of a model are quantized, as they are."""
    layers = {_plain(name): module for name, module in linear_modules(model).items() if not _is_added(name)}
    coded = {name: module for name, module in layers.items() if isinstance(module, _CODED)}
    if not coded:
        return QuantizationScheme()
    skipped = tuple(name for name in layers if name not in coded)
    first = next(iter(coded.values()))
    weight = quantized_weight(first)
    if not isinstance(weight, Blockwise4BitWeight):
        return QuantizationScheme(method="int8", skip_modules=skipped)
    state: Any = first.weight.quant_state
    method = cast(Literal["nf4", "fp4"], weight.scheme)
    return QuantizationScheme(
        method=method, blocksize=weight.blocksize, double_quant=bool(state.nested), skip_modules=skipped
    )


def _plain(name: str) -> str:
    """A name as the model without adapters has it."""
    return ".".join(part for part in name.split(".") if part != "base_layer")


def _is_added(name: str) -> bool:
    return any(part.startswith(_ADDED) for part in name.split("."))


def _check_same(model: nn.Module, base: TrainingBase) -> None:
    """The frozen weights in memory are those of the checkpoint, rounding apart; one of them at a time."""
    for name, module in model.named_modules():
        if isinstance(module, _CODED):
            layer = _plain(name)
            found, stored = quantized_weight(module).dequantize(torch.float32).cpu(), base.weight(layer).dequantize()
            _require_same(found, stored, base.place(f"{layer}.weight"))
    for name, values in model.named_parameters():
        plain = _plain(name)
        of_codes = isinstance(model.get_submodule(name.rpartition(".")[0]), _CODED) and name.endswith(".weight")
        if not values.requires_grad and not of_codes and not _is_added(name) and plain in base.shapes:
            _require_same(values.detach().cpu().float(), base.tensor(plain).float(), base.place(plain))


def _require_same(found: torch.Tensor, stored: torch.Tensor, place: Mapping[str, str]) -> None:
    """Other devices and versions of bitsandbytes round some codes differently, and a type rounds all of its values; a
    merged adapter, or another checkpoint, is further off."""
    if found.shape == stored.shape and bool((found - stored).norm() <= stored.norm() * _ROUNDING):
        return
    raise CheckpointError(
        "the base in memory is not the checkpoint that it is said to be loaded from",
        **place,
        found="other values" if found.shape == stored.shape else tuple(found.shape),
        expected=f"those of the file, {tuple(stored.shape)}",
        remedy="save the base before the training (save_pretrained), and name that directory: base=...",
    )
