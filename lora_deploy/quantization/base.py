"""The base that an adapter was trained on, read from its checkpoint one weight at a time.

Everything is named after the parameters of the transformers model, which is also how adapters name
their targets. A checkpoint may drop or add the model's prefix, leave tied weights out, or hold
bitsandbytes' codes in the place of a weight; none of that is visible from outside.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from lora_deploy.checkpoint import Checkpoint, resolve_model
from lora_deploy.errors import CheckpointError, InputError
from lora_deploy.quantization.hashes import CheckpointHash
from lora_deploy.quantization.model import head_modules, linear_modules
from lora_deploy.quantization.quantize import quantize
from lora_deploy.quantization.scheme import QuantizationScheme
from lora_deploy.quantization.skeleton import describe_linear, find_aliases, make_skeleton, renamed_keys
from lora_deploy.quantization.stored_codes import StoredCodes, all_finite
from lora_deploy.quantization.weight import DenseWeight, QuantizedWeight
from lora_deploy.task import Task, find_task, is_classification

__all__ = ["TrainingBase"]


class TrainingBase:
    """A checkpoint together with the quantization it was trained under.

    Args:
        model: A local directory or a hub id.
        scheme: How the linear layers were quantized for training. Ignored for a checkpoint that is quantized already,
            unless it contradicts it.
        task: What the model is for; None for what its configuration says.
        trained: Shape of each parameter that the adapter holds whole, by name. The head of a classifier may be there
            only: it decides the number of classes then.

    Attributes:
        directory: Where the checkpoint is.
        config: The configuration of the model, without any quantization.
        task: What the model is for.
        scheme: The scheme in force.
        linears: The linear layers but the output head, by name.
        embedding: Name of the layer that looks tokens up, if there is one.
        heads: Names of the linear layers of the output head. They are among `linears` only where the checkpoint holds
            them quantized.
        dtype: Type that transformers loads the parameters in: the configuration's, or else that of the file. Whatever
            is not quantized is cast to it, as it was in training.
        shapes: The shape of every parameter and persistent buffer, as the plain transformers model has it.
        aliases: Names of tied parameters -> the name whose values they share.

    Raises:
        CheckpointError: The checkpoint is missing, damaged, or holds a parameter of another shape.
    """

    def __init__(
        self,
        model: str | Path,
        scheme: QuantizationScheme | None = None,
        *,
        task: Task | None = None,
        trained: Mapping[str, tuple[int, ...]] | None = None,
    ) -> None:
        self.directory = resolve_model(model)
        self.checkpoint = Checkpoint(self.directory)
        self._codes = StoredCodes(self.checkpoint)
        stored = QuantizationScheme.from_model_config(self.checkpoint.config, self.directory / "config.json")
        self.prequantized = stored is not None
        self.scheme = self._agree(stored, scheme)
        self.task: Task = task or find_task(self.checkpoint.config.get("architectures"))
        self.config = self._read_config()
        self._trained = dict(trained or {}) if is_classification(self.task) else {}
        skeleton = self._make_skeleton()
        self.linears = {name: describe_linear(module) for name, module in linear_modules(skeleton).items()}
        # transformers quantizes none of these, and loads them in float32 where float16 is asked for (T5's `wo`).
        self._in_floats = set(skeleton._keep_in_fp32_modules or ()) if self.task == "seq2seq-lm" else set()
        if self._in_floats and self.scheme.method != "none":
            kept = sorted(self._in_floats | set(self.scheme.skip_modules))
            self.scheme = self.scheme.model_copy(update={"skip_modules": tuple(kept)})
        self.heads = tuple(head_modules(skeleton))
        embedding = skeleton.get_input_embeddings()
        self.embedding = next((name for name, module in skeleton.named_modules() if module is embedding), None)
        self.shapes = {name: tuple(value.shape) for name, value in skeleton.state_dict().items()}
        self.aliases = self._real_ties(find_aliases(skeleton))
        for head in self.heads:
            if self._is_quantized(f"{head}.weight"):
                self.linears[head] = describe_linear(skeleton.get_submodule(head))
        self.dtype = self._loading_dtype()
        self._hash = CheckpointHash(self.checkpoint)
        self._codes_of: dict[str, tuple[str, int]] = {}
        self._check()

    def _make_skeleton(self) -> PreTrainedModel:
        """The model of the configuration, which is told how many classes the adapter's own head knows."""
        with self._as_bad_configuration():
            skeleton = make_skeleton(self.config, self.task)
        self._prefix = f"{skeleton.base_model_prefix}."
        self._renamed = renamed_keys(skeleton, self.checkpoint)
        if is_classification(self.task):
            last = f"{next(reversed(head_modules(skeleton)), '')}.weight"
            shape = self._trained.get(last)
            if shape is not None and self._key(last) is None and shape[0] != self.config.num_labels:
                self.config.num_labels = shape[0]
                skeleton = make_skeleton(self.config, self.task)
            self.config.architectures = [type(skeleton).__name__]
        return skeleton

    def _real_ties(self, aliases: dict[str, str]) -> dict[str, str]:
        """The ties that hold: transformers keeps parameters apart where the checkpoint has other values for each."""
        ties = {}
        for alias, name in aliases.items():
            own, shared = self._key(alias), self._key(name)
            apart = own is not None and shared is not None and own != shared
            if apart and not torch.equal(self.checkpoint.read(str(own)), self.checkpoint.read(str(shared))):
                self.config.tie_word_embeddings = False
            else:
                ties[alias] = name
        return ties

    def _loading_dtype(self) -> torch.dtype | None:
        dtype = getattr(self.config, "dtype", None)
        if isinstance(dtype, str):
            dtype = getattr(torch, dtype, None)
        return dtype if isinstance(dtype, torch.dtype) else None

    def _agree(self, stored: QuantizationScheme | None, asked: QuantizationScheme | None) -> QuantizationScheme:
        if stored is None:
            return asked or QuantizationScheme()
        if asked is not None and asked.method not in ("none", stored.method):
            raise CheckpointError(
                "the checkpoint is quantized already, by another scheme than the one asked for",
                file=self.directory / "config.json",
                tensor="quantization_config",
                found=stored,
                expected=asked,
                remedy="leave --quantization out, or give the full-precision checkpoint",
            )
        return stored

    def _read_config(self) -> PreTrainedConfig:
        with self._as_bad_configuration():
            config = AutoConfig.from_pretrained(self.directory, trust_remote_code=False)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        return cast(PreTrainedConfig, config)

    @contextmanager
    def _as_bad_configuration(self) -> Iterator[None]:
        """Whatever transformers makes of a configuration that is wrong: its own exceptions have no common base."""
        kind = "classifier" if is_classification(self.task) else "causal language model"
        try:
            yield
        except Exception as error:
            raise CheckpointError(
                f"transformers cannot make a {kind} of the configuration",
                file=self.directory / "config.json",
                found=f"{type(error).__name__}: {error}".splitlines()[0][:300],
                remedy=f"give the directory of a {kind} that transformers loads",
            ) from error

    def _check(self) -> None:
        missing = []
        for name, shape in self.shapes.items():
            if name in self.aliases:
                continue
            key = self._key(name)
            if key is None:
                missing += [] if name in self._trained else [name]
            elif self._is_quantized(name):
                module = name.removesuffix(".weight")
                if module in self.linears:
                    self._codes.check(self._prefix_of(module), self.linears[module].shape)
            elif self.checkpoint.shape(key) != shape:
                raise CheckpointError(
                    "a weight does not have the shape that the model's configuration gives it",
                    file=self.checkpoint.file(key),
                    tensor=key,
                    found=self.checkpoint.shape(key),
                    expected=shape,
                )
        if missing:
            raise CheckpointError(
                f"the checkpoint lacks {len(missing)} of the model's {len(self.shapes)} weights",
                file=self.directory,
                tensor=missing[0],
                remedy=self._remedy_for(missing),
            )

    def _remedy_for(self, missing: list[str]) -> str:
        modules = dict.fromkeys(name.rpartition(".")[0] for name in missing)
        if is_classification(self.task) and set(modules) <= set(self.heads):
            roots = ", ".join(dict.fromkeys(module.partition(".")[0] for module in modules))
            return f"give a base with a trained head, or an adapter that was trained with modules_to_save: {roots}"
        return "copy or download the whole model again, or save it again with this version of transformers"

    def _key(self, name: str) -> str | None:
        """The checkpoint's name of a parameter: as it is, or without or with the prefix of the inner model.

        Google's first BERT checkpoints call a layer norm's weight and bias gamma and beta.
        """
        older = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        for spelled in dict.fromkeys((name, older)):
            for candidate in (spelled, spelled.removeprefix(self._prefix), self._prefix + spelled):
                if candidate in self.checkpoint:
                    return candidate
        return self._renamed.get(name)

    def _require_key(self, name: str) -> str:
        key = self._key(name)
        if key is None:
            raise CheckpointError("a weight of the model is missing", file=self.directory, tensor=name)
        return key

    def _is_quantized(self, name: str) -> bool:
        """Whether the checkpoint holds bitsandbytes' codes in the place of this weight."""
        key = self._key(name)
        if not self.prequantized or key is None or not key.endswith(".weight"):
            return False
        module = key.removesuffix("weight")
        return self._codes.holds(module)

    def holds_codes(self, module: str) -> bool:
        """Whether a linear layer was quantized in training."""
        if self.prequantized:
            return self._is_quantized(f"{module}.weight")
        return module in self.linears and self.scheme.applies_to(module)

    def _prefix_of(self, module: str) -> str:
        return self._require_key(f"{module}.weight").removesuffix("weight")

    def codes_of(self, module: str) -> tuple[str, int]:
        """What a linear layer's codes are, and how many weights share one absmax; ("none", 0) for a dense layer.

        A checkpoint may hold layers of other kinds and block sizes than its configuration says.
        """
        if module not in self._codes_of:
            self._codes_of[module] = self._find_codes(module)
        return self._codes_of[module]

    def _find_codes(self, module: str) -> tuple[str, int]:
        if not self.holds_codes(module):
            return "none", 0
        if self.prequantized:
            return self._codes.kind(self._prefix_of(module), self.linears[module].shape)
        if self.scheme.is_4bit:
            return self.scheme.method, self.scheme.blocksize
        return "int8", self.linears[module].shape[1]

    def tensor(self, name: str, rows: range | None = None) -> torch.Tensor:
        """A parameter or buffer that is not quantized, in the type that transformers loads it in.

        Args:
            name: Its name in the transformers model.
            rows: Those that are wanted; None for all.

        Raises:
            CheckpointError: It is missing, quantized, or holds numbers that are not finite.
        """
        key = self._require_key(self.aliases.get(name, name))
        values = self.checkpoint.read(key, rows)
        if values.is_floating_point():
            if not all_finite(values):
                raise CheckpointError(
                    "a weight of the base is not finite",
                    **self.place(name),
                    found="NaN or infinity",
                    expected="finite numbers",
                    remedy="the checkpoint is damaged: get it again",
                )
            if self.dtype == torch.float16 and self._in_floats & set(name.split(".")):
                return values.float()
            return values if self.dtype is None else self._load(values, name, self.dtype)
        if self._is_quantized(name):
            raise CheckpointError(
                "a weight that is no linear layer is quantized",
                file=self.checkpoint.file(key),
                tensor=key,
                found=values.dtype,
                expected="a floating-point weight",
            )
        return values

    def _load(self, values: torch.Tensor, name: str, dtype: torch.dtype) -> torch.Tensor:
        loaded = values.to(dtype)
        if dtype.itemsize < values.dtype.itemsize and not all_finite(loaded):
            raise CheckpointError(
                "a weight is too large for the type that the model's configuration loads it in",
                **self.place(name),
                found=f"{float(values.abs().max()):g}",
                expected=f"at most {torch.finfo(dtype).max:g}, for {dtype}",
                remedy="set dtype in config.json to that of the weights, if the adapter was trained so",
            )
        return loaded

    def weight(self, module: str) -> QuantizedWeight:
        """The weight of a linear layer as it was trained on: the stored codes, or quantized now.

        Args:
            module: Name of the layer.

        Returns:
            The weight, (out, in) also where the checkpoint stores (in, out).
        """
        name = f"{module}.weight"
        if self._is_quantized(name):
            return self._codes.weight(self._prefix_of(module), self.linears[module].shape)
        values = self.tensor(name)
        if not values.is_floating_point():
            raise CheckpointError(
                "a weight is stored as codes, but the scales that belong to them are missing",
                file=self.checkpoint.file(self._require_key(name)),
                tensor=name,
                found=values.dtype,
                expected="a floating-point weight, or codes with SCB or quant_state",
            )
        if self.linears[module].is_conv1d:
            values = values.t().contiguous()
        if self.prequantized or not self.scheme.applies_to(module):
            return DenseWeight(values)
        try:
            return quantize(values, self.scheme)
        except InputError as error:
            error.details = {**self.place(name), **error.details}
            raise

    def place(self, name: str) -> dict[str, str]:
        """File and tensor that hold a parameter, for messages.

        Args:
            name: Its name in the transformers model.
        """
        key = self._key(self.aliases.get(name, name))
        return {"file": str(self.directory if key is None else self.checkpoint.file(key)), "tensor": key or name}

    def sha256(self) -> str:
        """Hash of the checkpoint's tensors, names included: the same for any sharding, before any quantization."""
        return self._hash.result()

    def hash_ahead(self) -> None:
        """Begin with `sha256` beside whatever is done next."""
        self._hash.begin()
