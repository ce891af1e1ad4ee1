"""PEFT's adapter directory, both ways: `adapter_config.json` and `adapter_model.safetensors`.

Only safetensors are read: a pickle can run code. Every tensor must be understood; one that is not is refused, for
leaving it out would change what the adapter computes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lora_deploy.adapter.adapter import LoraAdapter
from lora_deploy.adapter.keys import plain_names
from lora_deploy.adapter.stored import TOKENS, Part, Stored, make_table, make_update, tokens_of
from lora_deploy.config import CONFIG_NAME, LoraConfig
from lora_deploy.errors import AdapterError, OutputError
from lora_deploy.inputs.adapter import WEIGHTS_NAME, open_adapter

__all__ = ["WEIGHTS_NAME", "read_adapter", "write_adapter"]

_PREFIX = "base_model.model."
_LORA_KEY = re.compile(
    r"(?P<target>.+)\.(?P<part>lora_[AB]\.weight|lora_B\.bias|lora_magnitude_vector|lora_embedding_[AB]"
    r"|token_adapter\.trainable_tokens_delta)(\.weight)?"
)


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
    config, file, _ = open_adapter(directory)
    parts: dict[str, dict[str, Part]] = {}
    parameters: dict[str, torch.Tensor] = {}
    for key, name, tensor in _read_tensors(file):
        match = _LORA_KEY.fullmatch(name)
        if match:
            parts.setdefault(match["target"], {})[match["part"]] = Part(key, tuple(tensor.shape))
        elif ".lora_" in name:
            raise AdapterError(
                "the adapter holds a kind of tensor that lora-deploy does not support",
                file=file,
                tensor=key,
                expected="lora_A.weight, lora_B.weight, lora_B.bias and lora_magnitude_vector of linear layers, "
                "lora_embedding_A and lora_embedding_B of embeddings",
            )
        else:
            parameters[name.replace(".base_layer.", ".")] = tensor
    for target, found in parts.items():
        _check_parts(file, target, found, _rank_of(target, parts, config), config)
    tables = {target: parts.pop(target) for target in list(parts) if not parts[target].keys() & {"lora_A.weight"}}
    _check_tokens(file, config, tables)
    if not parts and not tables:
        raise AdapterError("the adapter updates nothing", file=file, expected="lora_A and lora_B tensors")
    _check_parameters(file, config, {*parts, *tables}, parameters)
    updates, changes = Stored(file, parts, config, make_update), Stored(file, tables, config, make_table)
    if not lazy:
        return LoraAdapter(config, dict(updates), parameters, str(directory), dict(changes))
    return LoraAdapter(config, updates, parameters, str(directory), changes)


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
    except (SafetensorError, OSError) as error:
        raise AdapterError(
            "the adapter's weights are truncated or damaged",
            file=file,
            found=str(error),
            expected="a whole safetensors file",
            remedy="copy the file again",
        ) from error


def _rank_of(target: str, parts: Mapping[str, dict[str, Part]], config: LoraConfig) -> int:
    """The rank that an update must have; a head that is adapted as one with its embedding has the embedding's."""
    if config.ensure_weight_tying and "lora_A.weight" in parts[target]:
        turned = parts[target]["lora_A.weight"].shape[::-1]
        if any(found["lora_embedding_B"].shape == turned for found in parts.values() if "lora_embedding_B" in found):
            return turned[-1]
    return config.rank(target)


def _check_parts(file: Path, target: str, parts: dict[str, Part], rank: int, config: LoraConfig) -> None:
    """Make sure that an update has what the configuration says of it, no less and no more."""
    is_table = bool(parts.keys() & {"lora_embedding_A", "lora_embedding_B"})
    a_name, b_name = ("lora_embedding_A", "lora_embedding_B") if is_table else ("lora_A.weight", "lora_B.weight")
    wanted = {a_name, b_name}
    wanted |= {"lora_magnitude_vector"} if config.use_dora else set()
    wanted |= {"lora_B.bias"} if config.lora_bias and not is_table else set()
    if TOKENS in parts:
        wanted = {TOKENS}
    if parts.keys() != wanted:
        raise AdapterError(
            "a layer of the adapter has another update than its configuration says",
            file=file,
            tensor=target,
            found=", ".join(sorted(parts)),
            expected=", ".join(sorted(wanted)),
        )
    if TOKENS in parts:
        return
    a, b = parts[a_name].shape, parts[b_name].shape
    if len(a) != 2 or len(b) != 2 or a[0] != rank or b[1] != rank:
        raise AdapterError(
            "an update does not have the rank that the configuration gives it",
            file=file,
            tensor=target,
            found=f"A {a}, B {b}",
            expected=f"A ({rank}, in), B (out, {rank})",
        )
    for name in wanted - {a_name, b_name}:
        if parts[name].shape != b[:1]:
            raise AdapterError(
                "a vector of an update has another length than the layer has outputs",
                file=file,
                tensor=parts[name].key,
                found=parts[name].shape,
                expected=b[:1],
            )


def _check_tokens(file: Path, config: LoraConfig, tables: Mapping[str, dict[str, Part]]) -> None:
    """Rows and tokens must be as many, and every table that the configuration names must be there.

    A head that is tied to the embedding and has the same tokens has none of its own in the file.
    """
    asked = config.trainable_token_indices
    found = {target: parts[TOKENS].shape for target, parts in tables.items() if TOKENS in parts}
    for target, shape in found.items():
        expected = len(tokens_of(target, config))
        if len(shape) != 2 or shape[0] != expected:
            raise AdapterError(
                "the adapter holds rows for other tokens than its configuration names",
                file=file,
                tensor=target,
                found=shape,
                expected=f"({expected}, dim): a row for each of trainable_token_indices",
            )
    kinds = {tuple(indices) for indices in asked.values()} if isinstance(asked, dict) else {tuple(asked or ())}
    for missing in kinds - {()} - {tokens_of(target, config) for target in found}:
        raise AdapterError(
            "the adapter lacks the rows of the tokens that its configuration names",
            file=file,
            tensor="trainable_token_indices",
            found="no token_adapter.trainable_tokens_delta",
            expected=f"one for {list(missing)[:5]}",
            remedy="copy the file again, or save the adapter again",
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
        if config.ensure_weight_tying and saved and module.endswith(("embed_tokens", "lm_head")):
            is_saved = True  # PEFT saves both sides of a tie where it was told of one
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
    for target, update in (*adapter.updates.items(), *adapter.tables.items()):
        tensors |= {f"{_PREFIX}{target}.{name}": values.contiguous() for name, values in update.tensors().items()}
    for name, values in adapter.parameters.items():
        module, _, last = name.rpartition(".")
        if module in adapter.updates or module in adapter.tables:
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
    except (OSError, SafetensorError) as error:  # the latter is what safetensors makes of a full disk
        raise OutputError("the adapter could not be written", file=directory, found=str(error)) from error
