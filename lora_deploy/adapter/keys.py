"""The names of tensors in adapter files that were not written by save_pretrained(), or by an older one.

PEFT saves `base_model.model.<module>.lora_A.weight`. A model's own state has the adapter's name in its keys
(`lora_A.default.weight`, `modules_to_save.default.weight`), and wrappers leave their names there.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from lora_deploy.errors import AdapterError

__all__ = ["plain_names"]

_PREFIX = "base_model.model."
# torch.compile, FSDP and activation checkpointing.
_WRAPPERS = re.compile(r"\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_NAMED = (
    re.compile(r"(?P<before>.+\.lora_[AB])\.(?P<name>[^.]+)(?P<after>\.(weight|bias))"),
    re.compile(
        r"(?P<before>.+\.(lora_magnitude_vector|lora_embedding_[AB]|trainable_tokens_delta))"
        r"\.(?P<name>(?!weight$)[^.]+)(?P<after>(\.weight)?)"
    ),
    re.compile(r"(?P<before>.+)\.modules_to_save\.(?P<name>[^.]+)(?P<after>\..+)"),
)
# With bias="all" PEFT saves the biases of a module that is trained whole three times: as the module's, once more
# below its wrapper, and the base's own.
_AGAIN = re.compile(r"(?P<module>.+)\.(modules_to_save|original_module)\.bias")


def plain_names(file: Path, keys: Iterable[str]) -> dict[str, str]:
    """What each key names in the model, without PEFT's prefix, wrappers and the adapter's name.

    Args:
        file: For messages.
        keys: Those of the file. All of them begin with PEFT's prefix, once or more, or none does.

    Returns:
        By key: `<module>.lora_A.weight` and so on, or the name of a parameter. Keys that only repeat one are left out.

    Raises:
        AdapterError: Some keys have the prefix and some do not, the keys name two adapters, or two keys are one name.
    """
    names: dict[str, str] = {}
    adapters: dict[str, str] = {}
    bare: list[str] = []
    for key in keys:
        name = _WRAPPERS.sub("", key)
        if not name.startswith(_PREFIX):
            bare.append(key)
        while name.startswith(_PREFIX):
            name = name.removeprefix(_PREFIX)
        for pattern in _NAMED:
            match = pattern.fullmatch(name)
            if match:
                adapters.setdefault(match["name"], key)
                name = match["before"] + match["after"]
        names[key] = name
    if bare and len(bare) < len(names):
        raise AdapterError(
            "a tensor of the adapter has a name that PEFT does not give",
            file=file,
            tensor=bare[0],
            expected=f"a name that begins with {_PREFIX}, as others of this file",
        )
    if len(adapters) > 1:
        raise AdapterError(
            "the file holds more than one adapter",
            file=file,
            tensor=", ".join(adapters.values()),
            found=", ".join(sorted(adapters)),
            expected="one adapter",
            remedy="save each with PEFT's save_pretrained(DIR, selected_adapters=[NAME])",
        )
    known = set(names.values())
    repeated = {key: _AGAIN.fullmatch(name) for key, name in names.items()}
    names = {key: name for key, name in names.items() if not ((m := repeated[key]) and f"{m['module']}.bias" in known)}
    _refuse_twice(file, names)
    return names


def _refuse_twice(file: Path, names: dict[str, str]) -> None:
    seen: dict[str, str] = {}
    for key, name in names.items():
        # A trained bias of an adapted layer is `base_layer.bias`, and in older files `bias`.
        other = seen.setdefault(name.replace(".base_layer.", "."), key)
        if other != key:
            raise AdapterError(
                "two tensors of the adapter have the same place in the model",
                file=file,
                tensor=key,
                found=f"{other} too",
                expected="one of them",
            )
