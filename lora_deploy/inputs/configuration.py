"""What `config.json` asks for, held against what the checkpoint can be, before transformers makes anything of it.

transformers makes a list with an entry for each layer and one for each class as soon as it reads a configuration, and
graphs hold tables with a row for each position. A number is all it takes to ask for more memory than there is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lora_deploy.errors import CheckpointError

__all__ = ["check_configuration"]

_MOST_LAYERS = 1024  # the deepest models that are in use have some 130
_FEW_LAYERS = 128  # so many cost nothing, whatever the checkpoint holds
_MOST_LABELS = 1 << 16
_LARGEST_SIZE = 1 << 24  # the longest context that is in use has 10 million positions
_LARGEST_TABLE = 1 << 28  # positions times width, of float32: 1 GB
_LARGEST = (1 << 63) - 1

_LAYERS = re.compile(r"(.*_)?(layers?|depth|n_blocks|num_blocks)")
_LABELS = re.compile(r"num_labels|num_classes")
_SIZES = re.compile(
    r"((n|d|num|max|dim)_.*|.*_(size|sizes|dim|dims|width|length|len|rank|heads?|experts?|positions?|embeddings?|groups?"
    r"|buckets?|window|kernel|channels?)|hidden_sizes|factor|.*_factor)"
)
_NO_SIZES = re.compile(r".*(theta|base|param|token|step|epoch|seed|_ids?$|eps$|.*_scale$|bytes).*")
_TEXTS = ("model_type", "_name_or_path", "transformers_version", "hidden_act", "activation_function")


def check_configuration(config: dict[str, Any], file: Path, tensors: int | None = None) -> None:
    """Refuse a configuration that asks for an absurd amount of anything, or whose main parts are of the wrong kind.

    Args:
        config: The whole of `config.json`.
        file: Its path, for messages.
        tensors: How many the checkpoint has; None where that is not known.

    Raises:
        CheckpointError: A number is out of all bounds, or a value is of the wrong kind.
    """
    _check_kinds(config, file)
    layers = _MOST_LAYERS if tensors is None else min(_MOST_LAYERS, max(_FEW_LAYERS, tensors))
    for name, value in _numbers(config):
        key = name.rpartition(".")[2]
        bound, why = _LARGEST, ""
        if _LAYERS.fullmatch(key):
            bound, why = layers, "" if tensors is None else f": the checkpoint has {tensors} tensors"
        elif _LABELS.fullmatch(key):
            bound = _MOST_LABELS
        elif _SIZES.fullmatch(key) and not _NO_SIZES.fullmatch(key):
            bound = _LARGEST_SIZE
        if bound < abs(value) != float("inf"):
            raise _absurd(
                file, name, f"{value:.0f}" if abs(value) < 1e30 else "more than 1e30", f"at most {bound}{why}"
            )
    _check_table(config, file)


def _check_kinds(config: dict[str, Any], file: Path) -> None:
    """The parts that are read before transformers, which checks the kinds of the others, sees the configuration."""
    section = config.get("quantization_config")
    inner = section if isinstance(section, dict) else {}
    kinds = [("quantization_config", section, isinstance(section, dict), "an object")]
    kinds += [(name, config.get(name), isinstance(config.get(name), str), "a text") for name in _TEXTS]
    for name, value in (
        ("architectures", config.get("architectures")),
        ("quantization_config.llm_int8_skip_modules", inner.get("llm_int8_skip_modules")),
    ):
        is_texts = isinstance(value, list) and all(isinstance(one, str) for one in value)
        kinds.append((name, value, is_texts, "a list of texts"))
    for name, value, is_right, expected in kinds:
        if value is not None and not is_right:
            raise CheckpointError(
                "a value of the model's configuration is of the wrong kind",
                file=file,
                tensor=name,
                found=ascii(value)[:200],
                expected=expected,
                remedy="copy or download config.json again",
            )


def _numbers(config: dict[str, Any]) -> Iterator[tuple[str, int | float]]:
    """Every number in a configuration, by the names that lead to it. Lists count as the name they have."""
    waiting: list[tuple[str, Any]] = [("", config)]
    while waiting:
        name, value = waiting.pop()
        if isinstance(value, dict):
            waiting += [(f"{name}.{key}" if name else key, inner) for key, inner in value.items()]
        elif isinstance(value, list):
            waiting += [(name, inner) for inner in value]
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield name, value


def _check_table(config: dict[str, Any], file: Path) -> None:
    """A graph may hold a table of the rotations of every position."""
    for section in (config, *(value for value in config.values() if isinstance(value, dict))):
        positions, width, heads = (
            section.get(name) for name in ("max_position_embeddings", "hidden_size", "num_attention_heads")
        )
        head_dim = section.get("head_dim")
        if head_dim is None and type(width) is int and type(heads) is int and heads > 0:
            head_dim = width // heads
        if type(positions) is int and type(head_dim) is int and positions * head_dim > _LARGEST_TABLE:
            raise _absurd(
                file,
                "max_position_embeddings",
                f"{positions}, with {head_dim} values for each position",
                f"at most {_LARGEST_TABLE // head_dim} positions, a table of 1 GB",
            )


def _absurd(file: Path, name: str, found: str, expected: str) -> CheckpointError:
    return CheckpointError(
        "the model's configuration asks for more than any model has",
        file=file,
        tensor=ascii(name)[1:-1][:200],
        found=found,
        expected=expected,
        remedy="copy or download config.json again; where it is so meant, write a smaller number",
    )
