"""What is known of a base before its weights are there: its modules, its quantization, its bytes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from lora_deploy.errors import CheckpointError
from lora_deploy.inputs.configuration import check_configuration
from lora_deploy.inputs.json_files import read_json
from lora_deploy.planning.kinds import MatrixKind, find_kinds
from lora_deploy.quantization.model import head_modules, linear_modules
from lora_deploy.quantization.scheme import QuantizationScheme
from lora_deploy.quantization.skeleton import describe_linear, make_skeleton
from lora_deploy.task import Task, find_task

__all__ = ["PlannedBase"]

_NESTED = 256  # absmax values that share one scale in turn, in bitsandbytes' double quantization


@dataclass(frozen=True)
class PlannedBase:
    """A base as its configuration describes it; nothing of its weights is read.

    Attributes:
        model: As it was named.
        config: Of the model, without any quantization.
        task: What the model is for.
        scheme: How the linear layers are quantized in training.
        skeleton: The model on the meta device.
        kinds: Its kinds of matrices.
    """

    model: str
    config: PreTrainedConfig
    task: Task
    scheme: QuantizationScheme
    skeleton: PreTrainedModel
    kinds: list[MatrixKind]

    @classmethod
    def open(cls, model: str | Path, scheme: QuantizationScheme | None = None) -> PlannedBase:
        """Read the configuration and make the modules.

        Args:
            model: A local directory or a hub id; only `config.json` is read or downloaded.
            scheme: How the linear layers are quantized; None for what the checkpoint is, or else nf4.

        Raises:
            CheckpointError: There is no such model, transformers cannot make one, it is quantized by another scheme, or
                its attention cannot be recognised.
        """
        config = _read_config(str(model))
        raw = config.to_dict()
        stored = QuantizationScheme.from_model_config(raw, model)
        if stored is not None and scheme is not None and scheme.method not in ("none", stored.method):
            raise CheckpointError(
                "the checkpoint is quantized already, by another scheme than the one asked for",
                file=model,
                tensor="quantization_config",
                found=stored,
                expected=scheme,
                remedy="leave --quantization out, or give the full-precision checkpoint",
            )
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        task = find_task(raw.get("architectures"))
        try:
            skeleton = make_skeleton(config, task)
        except Exception as error:  # transformers' own exceptions have no common base
            raise _bad_configuration(str(model), error) from error
        try:
            kinds = find_kinds(skeleton)
        except CheckpointError as error:
            error.details = {"file": str(model), **error.details}
            raise
        return cls(str(model), config, task, stored or scheme or QuantizationScheme(method="nf4"), skeleton, kinds)

    @property
    def max_length(self) -> int | None:
        """Tokens that the model takes in a row, if it says so."""
        return getattr(self.config, "max_position_embeddings", None)

    def training_bytes(self, compute_dtype: torch.dtype) -> int:
        """Bytes of the frozen base while it is trained on: codes and scales, and everything else as floats.

        Args:
            compute_dtype: Of what is not quantized.
        """
        codes = 0
        quantized: set[str] = set()
        for name, module in linear_modules(self.skeleton).items():
            if self.scheme.applies_to(name):
                codes += code_bytes(describe_linear(module).shape, self.scheme)
                quantized.add(f"{name}.weight")
        floats = sum(parameter.numel() for name, parameter in self.skeleton.named_parameters() if name not in quantized)
        return codes + floats * compute_dtype.itemsize

    def multiply_adds(self) -> int:
        """Multiply-adds of the linear layers for a token, the output head included."""
        layers = [*linear_modules(self.skeleton).values(), *head_modules(self.skeleton).values()]
        return sum(rows * columns for rows, columns in (describe_linear(layer).shape for layer in layers))

    def largest_quantized(self) -> int:
        """Weights of the largest quantized layer, which is dequantized to compute with it; 0 where none is."""
        layers = linear_modules(self.skeleton).items()
        sizes = [describe_linear(module).shape for name, module in layers if self.scheme.applies_to(name)]
        return max((rows * columns for rows, columns in sizes), default=0)


def code_bytes(shape: tuple[int, int], scheme: QuantizationScheme) -> int:
    """Bytes of a quantized weight as bitsandbytes holds it.

    Args:
        shape: (out, in).
        scheme: nf4 and fp4: half a byte a weight and a float32 absmax for each block, or a byte for each and a float32
            for each 256 of them, with tables of 16 and 256 values; int8: a byte a weight and a float32 for each row.
    """
    rows, columns = shape
    if scheme.method == "int8":
        return rows * columns + 4 * rows
    blocks = -(-rows * columns // scheme.blocksize)
    tables = 16 * 4
    if scheme.double_quant:
        tables += 256 * 4 + 4
        return -(-rows * columns // 2) + blocks + 4 * -(-blocks // _NESTED) + tables
    return -(-rows * columns // 2) + 4 * blocks + tables


def _read_config(model: str) -> PreTrainedConfig:
    directory = Path(model)
    try:
        is_directory = directory.is_dir()
    except OSError:  # a name that is too long for the file system
        is_directory = False
    if is_directory:
        check_configuration(read_json(directory / "config.json"), directory / "config.json")
    elif directory.is_absolute() or model.startswith(".") or model.count("/") > 1 or directory.exists():
        raise CheckpointError("the model is not a directory", file=model, expected="a directory with config.json")
    try:
        if not is_directory:
            check_configuration(PreTrainedConfig.get_config_dict(model)[0], Path(model))
        config: Any = AutoConfig.from_pretrained(model, trust_remote_code=False)
    except CheckpointError:
        raise
    except Exception as error:  # as above, and the hub's
        raise _bad_configuration(model, error) from error
    return config  # type: ignore[no-any-return]


def _bad_configuration(model: str, error: Exception) -> CheckpointError:
    return CheckpointError(
        "transformers cannot make a model of the configuration",
        file=model,
        found=f"{type(error).__name__}: {error}".splitlines()[0][:300],
        expected="a directory with the config.json of a model that transformers knows, or a hub id",
    )
