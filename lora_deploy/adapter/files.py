"""PEFT's adapter directory, both ways: `adapter_config.json` and `adapter_model.safetensors`.

Only safetensors are read: a pickle can run code. Every tensor must be understood; one that is not is refused, for
leaving it out would change what the adapter computes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lora_deploy.adapter.adapter import LoraAdapter, LoraUpdate
from lora_deploy.adapter.keys import plain_names
from lora_deploy.config import CONFIG_NAME, LoraConfig
from lora_deploy.errors import AdapterError, OutputError

__all__ = ["WEIGHTS_NAME", "read_adapter", "write_adapter"]

WEIGHTS_NAME = "adapter_model.safetensors"

_PREFIX = "base_model.model."
_LORA_KEY = re.compile(r"(?P<target>.+)\.(?P<part>lora_[AB]\.weight|lora_B\.bias|lora_magnitude_vector)(\.weight)?")


def read_adapter(directory: str | Path, *, lazy: bool = False) -> LoraAdapter:
    """Read an adapter that PEFT or lora-deploy saved.

    Args:
        directory: Holds `adapter_config.json` and `adapter_model.safetensors`.
        lazy: Check everything now, but read each update again from the file when it is used, so that an adapter of
            any size costs little memory. The file must stay as it is meanwhile.

    Returns:
        The adapter, its tensors on the CPU in the type they were saved in.

    Raises:
        ConfigError: The configuration is missing, damaged or asks for something that is not supported.
        AdapterError: The weights are missing, damaged, pickled, not finite, or hold something that is not understood.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise AdapterError(
            "the adapter is not a directory",
            file=directory,
            expected=f"a directory with {CONFIG_NAME} and {WEIGHTS_NAME}",
        )
    _check_place(directory)
    file = directory / WEIGHTS_NAME
    pickle = directory / "adapter_model.bin"
    if pickle.exists() and not file.exists():
        raise AdapterError(
            "the adapter is a pickle, which can run code when it is read",
            file=pickle,
            expected=WEIGHTS_NAME,
            remedy="load it with PEFT where you trust it, and save it again with save_pretrained()",
        )
    config = LoraConfig.load(directory)
    parts: dict[str, dict[str, _Part]] = {}
    parameters: dict[str, torch.Tensor] = {}
    for key, name, tensor in _read_tensors(file):
        match = _LORA_KEY.fullmatch(name)
        if match:
            parts.setdefault(match["target"], {})[match["part"]] = _Part(key, tuple(tensor.shape))
        elif ".lora_" in name:
            raise AdapterError(
                "the adapter holds a kind of tensor that lora-deploy does not support",
                file=file,
                tensor=key,
                expected="lora_A.weight, lora_B.weight, lora_B.bias and lora_magnitude_vector of linear layers",
            )
        else:
            parameters[name.replace(".base_layer.", ".")] = tensor
    for target, found in parts.items():
        _check_parts(file, target, found, config)
    if not parts:
        raise AdapterError("the adapter updates nothing", file=file, expected="lora_A and lora_B tensors")
    _check_parameters(file, config, set(parts), parameters)
    updates = _StoredUpdates(file, parts, config)
    return LoraAdapter(config, updates if lazy else dict(updates), parameters, str(directory))


def _check_place(directory: Path) -> None:
    """PEFT saves an adapter that is not named "default" in a folder of its name; which one is meant is not guessed."""
    inside = sorted(file.parent.name for file in directory.glob(f"*/{CONFIG_NAME}"))
    if inside and not (directory / CONFIG_NAME).exists():
        raise AdapterError(
            "the directory holds adapters in folders of their names, and is none itself",
            file=directory,
            found=", ".join(inside),
            expected=f"a directory with {CONFIG_NAME} and {WEIGHTS_NAME}",
            remedy=f"give the folder of the adapter: {directory / inside[0]}",
        )


class _Part(NamedTuple):
    """A, B, or what else a layer's update has: its key in the file, and its shape."""

    key: str
    shape: tuple[int, ...]


class _StoredUpdates(Mapping[str, LoraUpdate]):
    """The updates of a file, each read when it is asked for."""

    def __init__(self, file: Path, parts: dict[str, dict[str, _Part]], config: LoraConfig) -> None:
        self._file, self._parts, self._config = file, parts, config

    def __getitem__(self, target: str) -> LoraUpdate:
        with safe_open(self._file, framework="pt") as opened:
            read = {name: opened.get_tensor(part.key) for name, part in self._parts[target].items()}
        return LoraUpdate(
            read["lora_A.weight"],
            read["lora_B.weight"],
            self._config.scaling(target),
            read.get("lora_magnitude_vector"),
            read.get("lora_B.bias"),
        )

    def __contains__(self, target: object) -> bool:
        return target in self._parts

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)


def _read_tensors(file: Path) -> Iterator[tuple[str, str, torch.Tensor]]:
    """Each tensor with its key and with what the key names in the model."""
    try:
        with safe_open(file, framework="pt") as opened:
            for key, name in plain_names(file, opened.keys()).items():
                tensor = opened.get_tensor(key)
                if not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all()):
                    raise AdapterError(
                        "a tensor of the adapter holds numbers that are not finite",
                        file=file,
                        tensor=key,
                        found="NaN or infinity" if tensor.is_floating_point() else str(tensor.dtype),
                        expected="finite floating-point numbers",
                        remedy="the training diverged: lower the learning rate, or take an earlier checkpoint",
                    )
                yield key, name, tensor
    except FileNotFoundError:
        raise AdapterError("the adapter has no weights", file=file) from None
    except (SafetensorError, OSError) as error:
        raise AdapterError(
            "the adapter's weights are truncated or damaged",
            file=file,
            found=str(error),
            expected="a whole safetensors file",
            remedy="copy the file again",
        ) from error


def _check_parts(file: Path, target: str, parts: dict[str, _Part], config: LoraConfig) -> None:
    """Make sure that an update has what the configuration says of it, no less and no more."""
    wanted = {"lora_A.weight", "lora_B.weight"}
    wanted |= {"lora_magnitude_vector"} if config.use_dora else set()
    wanted |= {"lora_B.bias"} if config.lora_bias else set()
    if parts.keys() != wanted:
        raise AdapterError(
            "a layer of the adapter has another update than its configuration says",
            file=file,
            tensor=target,
            found=", ".join(sorted(parts)),
            expected=", ".join(sorted(wanted)),
        )
    rank, a, b = config.rank(target), parts["lora_A.weight"].shape, parts["lora_B.weight"].shape
    if len(a) != 2 or len(b) != 2 or a[0] != rank or b[1] != rank:
        raise AdapterError(
            "an update does not have the rank that the configuration gives it",
            file=file,
            tensor=target,
            found=f"A {a}, B {b}",
            expected=f"A ({rank}, in), B (out, {rank})",
        )
    for name in wanted - {"lora_A.weight", "lora_B.weight"}:
        if parts[name].shape != b[:1]:
            raise AdapterError(
                "a vector of an update has another length than the layer has outputs",
                file=file,
                tensor=parts[name].key,
                found=parts[name].shape,
                expected=b[:1],
            )


def _check_parameters(file: Path, config: LoraConfig, targets: set[str], parameters: dict[str, torch.Tensor]) -> None:
    """Every tensor that is no A or B must be one that the configuration announces.

    PEFT also saves the base's own weight of an adapted output head (`lm_head.base_layer.weight`).
    """
    saved = config.modules_to_save or []
    for name in parameters:
        module, _, last = name.rpartition(".")
        path = module.split(".")
        ancestors = [".".join(path[:depth]) for depth in range(1, len(path) + 1)]
        is_saved = any(ancestor.endswith(part) for ancestor in ancestors for part in saved)
        is_base_weight = last == "weight" and module in targets
        if not is_saved and not is_base_weight and not (last == "bias" and config.bias != "none"):
            raise AdapterError(
                "the adapter holds a tensor that its configuration does not announce",
                file=file,
                tensor=name,
                found=f"modules_to_save={saved}, bias={config.bias!r}",
                expected="a module named in modules_to_save, or a trained bias",
            )


def write_adapter(adapter: LoraAdapter, directory: str | Path) -> None:
    """Write an adapter as PEFT reads it.

    Args:
        adapter: What to write.
        directory: Is made if it is not there. Files of the same names are replaced, each at once.

    Raises:
        OutputError: Something could not be written.
    """
    directory = Path(directory)
    tensors: dict[str, torch.Tensor] = {}
    for target, update in adapter.updates.items():
        tensors |= {f"{_PREFIX}{target}.{name}": values.contiguous() for name, values in update.tensors().items()}
    for name, values in adapter.parameters.items():
        module, _, last = name.rpartition(".")
        if module in adapter.updates:
            name = f"{module}.base_layer.{last}"
        tensors[f"{_PREFIX}{name}"] = values.contiguous()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        partial = directory / f"{WEIGHTS_NAME}.partial"
        save_file(tensors, partial, metadata={"format": "pt"})
        partial.replace(directory / WEIGHTS_NAME)
        partial = directory / f"{CONFIG_NAME}.partial"
        partial.write_text(adapter.config.to_json(), encoding="utf-8")
        partial.replace(directory / CONFIG_NAME)
    except OSError as error:
        raise OutputError("the adapter could not be written", file=directory, found=str(error)) from error
