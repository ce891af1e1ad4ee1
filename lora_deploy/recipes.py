"""Recipes: the options of an export under a name, shipped with the package (`export_recipes/`) or the user's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

import export_recipes
from lora_deploy.errors import UsageError
from lora_deploy.targets import ComputeDtype, Precision, Provider

__all__ = ["Mode", "Recipe", "find_recipe", "load_recipe", "shipped_recipes"]

Mode = Literal["merge", "fixed", "hot-swap", "pooled"]

_SHIPPED = Path(export_recipes.__path__[0])
_SUFFIXES = (".yaml", ".yml")
_ABOUT = frozenset({"name", "description", "when", "mode"})


class Recipe(BaseModel):
    """The options of an export, by the names and with the defaults of the command line.

    Attributes:
        name: What it is called.
        description: What it makes, in one line.
        when: When to take it.
        mode: "merge", or the kind of branch: "fixed", "hot-swap" or "pooled".
        calibration: As `--calibration`; a relative path counts from the recipe's directory.

    The other attributes are those options of `lora-deploy export` that say what is made, not where and from what.
    """

    # strict: "yes" is no number, and 4.0 is no level.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    name: str = Field(min_length=1)
    description: str = Field(min_length=1)
    when: str = Field(min_length=1)
    mode: Mode
    provider: Provider = "cpu"
    precision: Precision | None = None
    compute_dtype: ComputeDtype | None = None
    expand: bool = False
    accuracy_level: Literal[0, 4] | None = None
    cache: Literal["growing", "in-place"] | None = None
    block_size: Literal[16, 32, 64, 128, 256] = 32
    head_precision: Literal["int8", "int4", "float"] = "int8"
    keep: list[str] = []
    budget_bits: float | None = None
    correction: int = Field(default=0, ge=0)
    calibration: str | None = None
    calibration_rows: int = Field(default=96, ge=0)
    adapter_precision: Literal["int8"] | None = None
    quantization: Literal["auto", "none", "nf4", "fp4", "int8"] = "auto"
    no_double_quant: bool = False
    graph: Literal["auto", "mobius", "traced"] = "auto"

    def options(self) -> dict[str, Any]:
        """Keyword arguments for `export_onnx`.

        Raises:
            UsageError: Options of int8 or int4 contradict each other.
        """
        from lora_deploy.requantize import Requantization, parse_keep

        requantization = None
        if self.mode == "merge" and self.precision in ("int8", "int4"):
            requantization = Requantization(
                bits=4 if self.precision == "int4" else 8,
                blocksize=self.block_size,
                head={"int8": 8, "int4": 4, "float": None}[self.head_precision],
                keep=parse_keep(self.keep),
                budget_bits=self.budget_bits,
                correction=self.correction,
                data=None if self.calibration is None else Path(self.calibration),
                rows=self.calibration_rows,
            )
        return {
            "merge": self.mode == "merge",
            "branch": None if self.mode == "merge" else self.mode,
            "precision": self.precision,
            "compute_dtype": self.compute_dtype,
            "expand": self.expand,
            "accuracy_level": self.accuracy_level,
            "cache": self.cache,
            "requantization": requantization,
            "adapter_precision": self.adapter_precision,
            "quantization": self.quantization,
            "double_quant": not self.no_double_quant,
            "graph": self.graph,
            "provider": self.provider,
        }

    def defaults(self) -> dict[str, Any]:
        """What the recipe says, by the names of the command line's parameters, without how adapters are exported."""
        return self.model_dump(include=self.model_fields_set - _ABOUT)


def shipped_recipes() -> list[str]:
    """Names of the recipes in the package, in order."""
    return sorted(file.stem for file in _SHIPPED.glob("*.yaml"))


def find_recipe(name_or_path: str | Path) -> Path:
    """The file of a recipe: one of the package by its name, or the user's own by its path.

    Raises:
        UsageError: There is no such recipe, or no such file.
    """
    text = str(name_or_path)
    if isinstance(name_or_path, Path) or text.endswith(_SUFFIXES) or "/" in text or "\\" in text:
        path = Path(name_or_path)
        if not path.is_file():
            raise UsageError(
                "there is no such file", file=path, expected="a recipe in YAML", remedy="see `lora-deploy recipes`"
            )
        return path
    if text not in shipped_recipes():
        raise UsageError(
            "there is no such recipe",
            found=text or "nothing",
            expected=", ".join(shipped_recipes()),
            remedy="take one of these, or give the path of a .yaml file",
        )
    return _SHIPPED / f"{text}.yaml"


def load_recipe(name_or_path: str | Path) -> Recipe:
    """Read a recipe.

    Args:
        name_or_path: The name of one in the package, or the path of a .yaml file.

    Raises:
        UsageError: There is none, or it says something that cannot be.
    """
    file = find_recipe(name_or_path)
    try:
        recipe = Recipe.model_validate(_read(file))
    except ValidationError as error:
        raise _as_usage_error(error, file) from None
    if recipe.calibration is not None:
        recipe = recipe.model_copy(update={"calibration": str(file.parent / recipe.calibration)})
    return recipe


def _read(file: Path) -> dict[str, Any]:
    import yaml

    try:
        text = file.read_text(encoding="utf-8")
        for key in _repeated_keys(yaml.compose(text, Loader=yaml.SafeLoader)):
            raise UsageError("a recipe says something twice", file=file, tensor=key, remedy="leave one of the two out")
        values = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError("the recipe cannot be read", file=file, found=str(error), expected="UTF-8") from error
    except yaml.YAMLError as error:
        place = getattr(error, "problem_mark", None)
        where = f"line {place.line + 1}: " if place is not None else ""
        raise UsageError(
            "the recipe is no YAML",
            file=file,
            found=f"{where}{getattr(error, 'problem', None) or error}",
            expected="lines of KEY: VALUE",
            remedy="see `lora-deploy recipes show merged-int4-cpu` for one",
        ) from None
    if not isinstance(values, dict):
        raise UsageError(
            "this is no recipe",
            file=file,
            found=f"a {type(values).__name__}" if values is not None else "an empty file",
            expected="lines of KEY: VALUE",
            remedy="see `lora-deploy recipes show merged-int4-cpu` for one",
        )
    return values


def _repeated_keys(node: Any) -> list[str]:
    """Keys that stand twice: PyYAML takes the last without a word."""
    pairs = getattr(node, "value", None)
    if getattr(node, "id", "") != "mapping" or pairs is None:
        return []
    keys = [str(key.value) for key, _ in pairs]
    return sorted({key for key in keys if keys.count(key) > 1})


def _as_usage_error(error: ValidationError, file: Path) -> UsageError:
    """The first thing that is wrong, in the form of the house."""
    first = error.errors()[0]
    key = ".".join(map(str, first["loc"]))
    kind, field = first["type"], str(first["loc"][0])
    if kind in ("extra_forbidden", "invalid_key"):
        return UsageError(
            "a recipe has no such key",
            file=file,
            tensor=key,
            found=first["input"],
            expected=", ".join(Recipe.model_fields),
            remedy="take it out, or write one of these",
        )
    if kind == "missing":
        return UsageError("a recipe lacks this key", file=file, tensor=key, expected=f"a line {key}: …")
    message = first["msg"].removeprefix("Input should be ")
    return UsageError(
        "a recipe cannot say this",
        file=file,
        tensor=key,
        found=repr(first["input"]),
        expected=message,
        remedy=f"see --{field.replace('_', '-')} in `lora-deploy export --help`"
        if field not in _ABOUT
        else "see `lora-deploy recipes show merged-int4-cpu` for one",
    )
