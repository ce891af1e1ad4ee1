"""`adapter_config.json`, read and written strictly.

PEFT drops configuration keys that it does not know with a warning. A key that is not read may
change the maths of the adapter, so here a key that is unknown or not supported is refused as soon
as it holds a value. The fields and defaults are PEFT's (0.21).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from lora_deploy.errors import ConfigError
from lora_deploy.inputs.json_files import parse_json
from lora_deploy.patterns import MOST_PATTERNS, check_pattern, compile_pattern

__all__ = ["CONFIG_NAME", "LoraConfig", "name_matches", "pattern_matches"]

CONFIG_NAME = "adapter_config.json"

# Fields that say where the adapter came from, that PEFT always writes and that do nothing without another one
# (megatron_config, use_qalora), which is refused, or that say how A and B began (init_lora_weights decides).
_CARRIED = (
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "eva_config",
    "inference_mode",
    "loftq_config",
    "lora_ga_config",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "revision",
    "task_type",
)

_LARGEST = 1e30  # of ranks and alphas: what float32 holds, with room for their quotient
_Token = Annotated[int, Field(ge=0)]
# How A and B began does not matter once they are trained, as long as the base stayed as it was.
_INITS_OF_A_AND_B = ("gaussian", "orthogonal", "eva", "mica")
# PEFT takes these beginnings out of the base's weights, which it does not save with the adapter.
_INITS_OF_THE_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")
_REMEDY_CONVERSION = (
    "convert it with PEFT: save the untrained adapter with save_pretrained(INIT) and init_lora_weights=True in its "
    "config, and the trained one with save_pretrained(DIR, path_initial_model_for_weight_conversion=INIT)"
)
_REMEDY_LOFTQ = (
    "save the base that was trained with get_base_model().save_pretrained(), set init_lora_weights to true in the "
    "adapter's configuration, and give that base"
)


class LoraConfig(BaseModel):
    """What an adapter is: rank, scaling, targets. PEFT's names and defaults.

    Attributes:
        r: Rank of the update. `A` is (r, in), `B` is (out, r).
        lora_alpha: Numerator of the scaling.
        lora_dropout: Dropout probability on the input of `A`, during training only.
        target_modules: Names of the modules to adapt: a list (whole name or its last part), a
            regular expression that must match the whole name, or "all-linear" (every linear layer
            but the output head; the default).
        exclude_modules: As `target_modules`, modules to leave alone.
        layers_to_transform: Indices of the layers to adapt; None for all.
        layers_pattern: Name of the list that holds the layers; found by itself when None.
        fan_in_fan_out: Whether the adapted layers store their weight as (in, out). Set from the
            type of each layer; a value that disagrees is warned about.
        merge_weights: Merge on `.eval()`, unmerge on `.train()`.
        bias: Which biases are trained: none of them, all, or those of the adapted layers.
        modules_to_save: Names of modules that are trained whole and saved with the adapter.
        init_lora_weights: True: `A` Kaiming-uniform; "gaussian": `A` normal with std 1/r; in both
            `B` is zero, so that training starts from the base. "orthogonal": both random with B @ A zero, for even
            ranks (https://datta0.github.io/posts/rethink-lora-init/). False: `B` is random too. "eva" and "mica" are
            read, not trained; those that change the base's weights ("pissa", "olora", "corda", "lora_ga", "loftq")
            are refused.
        use_rslora: Scale by lora_alpha / sqrt(r) (https://arxiv.org/abs/2312.03732).
        rank_pattern: Ranks of single modules: a regular expression for the end of the name -> r.
        alpha_pattern: The same for lora_alpha.
        use_dora: Train the length of each row of the weight apart from its direction (https://arxiv.org/abs/2402.09353).
        lora_bias: `B` has a bias of its own, scaled as the rest of the update.
        trainable_token_indices: Tokens whose rows of the input embedding are trained alone, or such lists by the name
            of the embedding or output head. A head that is tied to the embedding has the same rows, unless it is named.
        ensure_weight_tying: An embedding and the output head that is tied to it are adapted, or trained whole, as one;
            without it each is changed alone.
    """

    model_config = ConfigDict(extra="allow", validate_assignment=True, allow_inf_nan=False)

    r: int = Field(default=8, gt=0)
    lora_alpha: int | float = 8
    lora_dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    target_modules: list[str] | str | None = "all-linear"
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    fan_in_fan_out: bool = False
    merge_weights: bool = False
    bias: Literal["none", "all", "lora_only"] = "none"
    modules_to_save: list[str] | None = None
    init_lora_weights: bool | str = True
    use_rslora: bool = False
    rank_pattern: dict[str, Annotated[int, Field(gt=0)]] = Field(default_factory=dict)
    alpha_pattern: dict[str, int | float] = Field(default_factory=dict)
    use_dora: bool = False
    lora_bias: bool = False
    trainable_token_indices: list[_Token] | dict[str, list[_Token]] | None = None
    ensure_weight_tying: bool = False
    base_model_name_or_path: str | None = None
    revision: str | None = None
    task_type: str | None = "CAUSAL_LM"

    @model_validator(mode="before")
    @classmethod
    def _refuse_unread_keys(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        for key, value in values.items():
            if key in cls.model_fields or key in _CARRIED:
                continue
            # By identity: 0 == False, but 0 is a value.
            if not (value is None or value is False or value in ("", [], {}, ())):
                raise ConfigError(
                    "this adapter uses a setting that lora-deploy does not support, and leaving it out could change "
                    "what the adapter computes",
                    tensor=str(key),
                    found=json.dumps(value, default=str)[:200],
                    expected="no value",
                    remedy="train without it, or open an issue that names the setting",
                )
        if values.get("peft_type", "LORA") not in ("LORA", None):
            raise ConfigError(
                "this is not a LoRA adapter", tensor="peft_type", found=values["peft_type"], expected="LORA"
            )
        # A key that is off is kept too: what PEFT wrote goes back to PEFT.
        return {key: sorted(value) if isinstance(value, set) else value for key, value in values.items()}

    @field_validator("init_lora_weights")
    @classmethod
    def _check_init(cls, value: bool | str) -> bool | str:
        name = str(value).lower()
        if name.startswith(_INITS_OF_THE_BASE):
            raise ConfigError(
                "this adapter belongs to a base whose weights PEFT changed when training began, and does not hold them",
                tensor="init_lora_weights",
                found=value,
                expected="a plain LoRA",
                remedy=_REMEDY_LOFTQ if name == "loftq" else _REMEDY_CONVERSION,
            )
        if isinstance(value, str) and name not in _INITS_OF_A_AND_B:
            raise ValueError(f"true, false, or one of {', '.join(_INITS_OF_A_AND_B)}")
        return value

    @model_validator(mode="after")
    def _refuse_both(self) -> LoraConfig:
        """What PEFT refuses too, so that it can read what is saved."""
        if self.lora_bias and not isinstance(self.init_lora_weights, bool):
            raise ConfigError(
                "a bias of B goes with the plain initializations only, in PEFT too",
                tensor="lora_bias",
                found=f"init_lora_weights {self.init_lora_weights!r}",
                expected="true or false",
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ConfigError(
                "layers_pattern names the layers of layers_to_transform, which is not set",
                tensor="layers_pattern",
                found=self.layers_pattern,
                expected="no value, or layers_to_transform too",
            )
        if self.use_dora and self.lora_bias:
            raise ConfigError(
                "DoRA and a bias of B do not go together, in PEFT neither",
                tensor="lora_bias",
                found="use_dora and lora_bias",
                expected="one of them",
            )
        return self

    @field_validator("target_modules", "exclude_modules", "rank_pattern", "alpha_pattern", "layers_pattern")
    @classmethod
    def _check_patterns(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse what is no regular expression, and what could take for ever to match."""
        is_layers = info.field_name == "layers_pattern"  # a list of names elsewhere, of patterns here
        if isinstance(value, list) and not is_layers:
            return value
        patterns = [value] if isinstance(value, str) else list(value or ())
        for pattern in patterns:
            try:
                if len(patterns) > MOST_PATTERNS:
                    raise ValueError(f"{len(patterns)} patterns, more than {MOST_PATTERNS}")
                check_pattern(pattern, loops=1 if is_layers else None)
                if is_layers:  # becomes a part of a rule with this group, which must be the only one of its name
                    check_pattern(rf"{pattern}(?P<index>\d+)", loops=2)
            except ValueError as error:
                raise ConfigError(
                    "a pattern of the adapter's configuration is no regular expression that can be used",
                    tensor=f"{info.field_name}: {ascii(pattern)[1:-1][:200]}",
                    found=error,
                    expected="a regular expression without repetitions or choices inside repetitions",
                    remedy="list the names of the modules instead",
                ) from error
        return value

    @field_validator("r", "lora_alpha", "rank_pattern", "alpha_pattern")
    @classmethod
    def _bound_numbers(cls, value: Any) -> Any:
        for number in value.values() if isinstance(value, dict) else [value]:
            if abs(number) > _LARGEST:
                raise ValueError(f"at most {_LARGEST:g}")
        return value

    @field_validator("trainable_token_indices")
    @classmethod
    def _refuse_twice(cls, value: Any) -> Any:
        for indices in value.values() if isinstance(value, dict) else [value or []]:
            if len(set(indices)) != len(indices):
                raise ValueError("each token once")
        return value

    def rank(self, module: str) -> int:
        """The rank of one module, `rank_pattern` included.

        Args:
            module: Full dotted name.
        """
        return int(_pattern_value(self.rank_pattern, module, self.r))

    def scaling(self, module: str) -> float:
        """The factor on `B @ A` of one module: lora_alpha / r, or lora_alpha / sqrt(r) with rslora."""
        alpha = float(_pattern_value(self.alpha_pattern, module, self.lora_alpha))
        rank = self.rank(module)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    @classmethod
    def load(cls, path: str | Path) -> LoraConfig:
        """Read `adapter_config.json`.

        Args:
            path: The file, or the directory that holds it.

        Raises:
            ConfigError: It is missing, not JSON, has a wrong type or a setting that is not supported.
        """
        file = Path(path)
        if file.is_dir():
            file = file / CONFIG_NAME
        try:
            values = parse_json(file, ConfigError)
        except FileNotFoundError:
            raise ConfigError(
                "the adapter has no configuration",
                file=file,
                expected=f"a directory with {CONFIG_NAME} and adapter_model.safetensors",
            ) from None
        except (OSError, ValueError) as error:
            raise ConfigError(
                "the adapter's configuration cannot be read", file=file, found=str(error)[:200]
            ) from error
        if not isinstance(values, dict):
            raise ConfigError("the adapter's configuration is no JSON object", file=file, found=type(values).__name__)
        try:
            return cls(**values)
        except ConfigError as error:
            error.details = {"file": str(file), **error.details}
            raise
        except ValidationError as error:
            first = error.errors()[0]
            raise ConfigError(
                "the adapter's configuration has a value of the wrong kind",
                file=file,
                tensor=".".join(str(part) for part in first["loc"]),
                found=repr(first.get("input"))[:200],
                expected=first["msg"],
            ) from error

    def to_json(self) -> str:
        """The text of `adapter_config.json` as PEFT reads it: two spaces, sorted keys and lists."""
        values = self.model_dump(exclude={"merge_weights"})
        values = {"inference_mode": True} | values | {"peft_type": "LORA"}
        for key in ("target_modules", "exclude_modules"):  # Sets in PEFT.
            if isinstance(values[key], list):
                values[key] = sorted(values[key])
        if self.merge_weights:  # PEFT left this field behind; written only where it says something.
            values["merge_weights"] = True
        return json.dumps(values, indent=2, sort_keys=True) + "\n"


def pattern_matches(pattern: str, module: str) -> bool:
    """Whether a key of `rank_pattern` or `alpha_pattern` fits the end of a module's name.

    Args:
        pattern: The key.
        module: Full dotted name.

    Raises:
        ConfigError: It takes too long to tell.
    """
    with _named(pattern, module):
        return compile_pattern(pattern).matches_end(module)


def name_matches(pattern: str, module: str) -> bool:
    """Whether a string in `target_modules` or `exclude_modules` fits the whole of a module's name.

    Args:
        pattern: The string.
        module: Full dotted name.

    Raises:
        ConfigError: It takes too long to tell.
    """
    with _named(pattern, module):
        return compile_pattern(pattern).fullmatch(module)


@contextmanager
def _named(pattern: str, module: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ConfigError(
            "a pattern of the adapter's configuration cannot be matched with a module's name",
            tensor=ascii(pattern)[1:-1][:200],
            found=f"{error}: {ascii(module)[1:-1][:100]}",
            expected="a pattern that is matched quickly, and a name of at most 1000 letters",
            remedy="list the names of the modules instead",
        ) from error


def _pattern_value(patterns: dict[str, Any], module: str, default: float) -> float:
    # The first that matches, as in PEFT; sorted, because PEFT and we sort the keys of the file, so that overlapping
    # patterns mean the same before and after saving.
    for pattern, value in sorted(patterns.items()):
        if pattern_matches(pattern, module):
            return float(value)
    return float(default)
