"""A model in memory, in PEFT's layers or ours, becomes what export reads: an adapter's files and its base's record."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import nn

from lora_deploy.adapter import TrainingRecord, read_adapter, save_adapter
from lora_deploy.adapter.files import WEIGHTS_NAME
from lora_deploy.config import CONFIG_NAME
from lora_deploy.errors import AdapterError, CheckpointError, OutputError, UsageError
from lora_deploy.export.merge import open_base
from lora_deploy.integrations.spread import is_spread, refuse_spread, trained_tensors, whole
from lora_deploy.layers.model import adapted_layers
from lora_deploy.quantization.base import TrainingBase
from lora_deploy.quantization.bnb import bitsandbytes as bnb
from lora_deploy.quantization.hashes import hash_codes
from lora_deploy.quantization.model import linear_modules, quantized_weight
from lora_deploy.quantization.scheme import QuantizationScheme
from lora_deploy.quantization.weight import Blockwise4BitWeight
from lora_deploy.versions import installed_versions

__all__ = ["save_together", "save_trained", "write_together"]

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
        UsageError: The model does not say where its base is, or its parameters are spread over processes.
        OutputError: It could not be written.
    """
    refuse_spread(model)
    record = save_together(model, Path(directory), base)
    assert record is not None
    return record


def save_together(model: nn.Module, directory: Path | None, base: str | Path | None = None) -> TrainingRecord | None:
    """As `save_trained`, by all processes that the parameters may be spread over.

    Args:
        model: See there.
        directory: Where to; None in processes that only take part.
        base: See there.

    Returns:
        The record; None in processes that only take part.

    Raises:
        See there; and UsageError: Our own layers are spread.
    """
    write_together(model, directory)
    plain = _without_wrapper(model)
    if directory is None:
        _check_same(plain, None)
        return None
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


def write_together(model: nn.Module, directory: Path | None) -> None:
    """Write the adapter of a model in memory, in PEFT's format.

    Args:
        model: As `save_trained` takes it.
        directory: As `save_together` takes it.

    Raises:
        AdapterError, ConfigError, OutputError, UsageError: As `save_together`.
    """
    spread = is_spread(model)
    if adapted_layers(model):
        if spread:
            raise UsageError(
                "the layers of get_lora_model are not exported where parameters are spread over processes",
                found="FSDP or DeepSpeed ZeRO-3",
                remedy="adapt the model with peft.get_peft_model",
            )
        if directory is not None:
            save_adapter(model, directory)
        return
    name = _peft_name(model)
    state = trained_tensors(model, keep=directory is not None) if spread else None
    if directory is None:
        return
    try:
        directory.mkdir(parents=True, exist_ok=True)
        # Beside what is there, which may have a card or a directory of the adapter's name.
        with tempfile.TemporaryDirectory(dir=directory, prefix=".saving-") as scratch:
            model.save_pretrained(scratch, selected_adapters=[name], state_dict=state)  # type: ignore[operator]
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


def _check_same(model: nn.Module, base: TrainingBase | None) -> None:
    """The frozen weights in memory are those of the checkpoint, rounding apart; one of them at a time.

    Args:
        model: Without PEFT's wrapper.
        base: The checkpoint; None in processes that only take part.
    """
    for name, module, values in _frozen(model):
        with whole(values) as found:
            if base is None:
                continue
            plain = _plain(name)
            if isinstance(module, _CODED) and name.endswith(".weight"):
                stored = base.weight(plain.removesuffix(".weight")).dequantize()
                _require_same(quantized_weight(module).dequantize(torch.float32).cpu(), stored, base.place(plain))
            elif plain in base.shapes:
                _require_same(found.cpu().float(), base.tensor(plain).float(), base.place(plain))


def _frozen(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Parameter]]:
    """The parameters of the base, by name, each with its module."""
    for name, values in model.named_parameters():
        if not values.requires_grad and not _is_added(name):
            yield name, model.get_submodule(name.rpartition(".")[0]), values


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
