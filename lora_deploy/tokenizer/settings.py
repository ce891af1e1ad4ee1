"""What the files beside `tokenizer.json` say, read as transformers' `from_pretrained` reads them.

What is not known here for certain is an `UnsureError`: then transformers itself must read the files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from lora_deploy.inputs.json_files import read_json
from lora_deploy.tokenizer.choice import RECIPES, choose_class
from lora_deploy.tokenizer.recipes import Recipe, UnsureError

__all__ = ["NAMED", "Settings", "Token", "read_settings"]

Token = str | AddedToken

# transformers' order, in which tokens that the vocabulary does not have are added to it.
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_UNKNOWN_LENGTH = int(1e30)
# Keys that are read below, or that decide the class.
_READ = {
    *NAMED,
    "added_tokens_decoder",
    "additional_special_tokens",
    "chat_template",
    "clean_up_tokenization_spaces",
    "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output",
    "extra_special_tokens",
    "max_len",
    "model_input_names",
    "model_max_length",
    "padding_side",
    "split_special_tokens",
    "tokenizer_class",
}
# Keys that the recipes of rebuilt tokenizers read. One that is taken as its file is has no use for them.
_OPTIONS = {
    "add_prefix_space",
    "do_lower_case",
    "legacy",
    "strip_accents",
    "tokenize_chinese_chars",
    "trim_offsets",
}
# Keys that transformers only keeps, or takes away where there is a `tokenizer.json`.
_IDLE = {
    "add_bos_token",
    "add_eos_token",
    "backend",
    "device_map",
    "do_basic_tokenize",
    "errors",
    "is_local",
    "local_files_only",
    "max_length",
    "name_or_path",
    "never_split",
    "pad_to_multiple_of",
    "pad_token_type_id",
    "processor_class",
    "sp_model_kwargs",
    "spaces_between_special_tokens",
    "special_tokens_map_file",
    "stride",
    "truncation_side",
    "truncation_strategy",
    "use_default_system_prompt",
    "use_fast",
}
_FILE = "tokenizer.json"


@dataclass(frozen=True)
class Settings:
    """What there is to know of a tokenizer beside its vocabulary.

    Attributes:
        directory: Where it is from.
        recipe: How transformers makes it anew; None where it is taken as `tokenizer.json` has it.
        options: Keyword arguments of its class.
        added: The tokens that are told apart before the text is split, by id; None for those of `tokenizer.json`.
        named: Special tokens by name.
        extra: Special tokens without a name.
        chat_template: The chat template; None where there is none.
        special_tokens: Those with names, as text.
    """

    directory: Path
    recipe: Recipe | None
    options: dict[str, Any]
    added: dict[int, AddedToken] | None
    named: dict[str, Token]
    extra: list[Token]
    chat_template: str | None
    special_tokens: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "special_tokens", {name: str(token) for name, token in self.named.items()})

    @property
    def file(self) -> Path:
        """`tokenizer.json`."""
        return self.directory / _FILE

    @property
    def model_max_length(self) -> int:
        """How many tokens the model takes; 1e30 where nothing says."""
        found = self.options.get("model_max_length", self.options.get("max_len"))
        return _UNKNOWN_LENGTH if found is None else int(found)

    @property
    def padding_side(self) -> str:
        """Where shorter texts are filled up: "left" or "right"."""
        usual = "right" if self.recipe is None else self.recipe.padding_side
        side = self.options.get("padding_side", usual)
        if side not in ("left", "right"):
            raise UnsureError(f"padding_side {side}")
        return str(side)

    @property
    def gives_token_types(self) -> bool:
        """Whether the model is told which of two texts a token is of."""
        usual = self.recipe is not None and self.recipe.gives_token_types
        names = self.options.get("model_input_names")
        return usual if names is None else "token_type_ids" in names

    @property
    def cleans_up(self) -> bool:
        """Whether spaces before punctuation are taken out of decoded text."""
        return bool(self.options.get("clean_up_tokenization_spaces", False))

    @property
    def cleans_up_pieces_of_words(self) -> bool:
        """Whether this is done even of a vocabulary of pieces, whose spaces are the text's own."""
        name = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"
        return bool(self.options.get(name, False))


def read_settings(directory: Path) -> Settings:
    """Read `config.json`, `tokenizer_config.json`, `special_tokens_map.json` and `chat_template.jinja`.

    Args:
        directory: What was exported.

    Raises:
        UnsureError: They say something whose consequences are not known here.
        CheckpointError: One is damaged.
        OSError: One cannot be read.
    """
    options = _read_optional(directory / "tokenizer_config.json")
    unknown = options.keys() - _READ - _OPTIONS - _IDLE
    if unknown:
        raise UnsureError(f"tokenizer_config.json has {sorted(unknown)}")
    recipe = RECIPES[choose_class(directory, read_json(directory / "config.json"), options)]
    if "additional_special_tokens" in options and not options.get("extra_special_tokens"):
        options["extra_special_tokens"] = options.pop("additional_special_tokens")
    added: dict[int, AddedToken] | None = None
    if "added_tokens_decoder" in options:
        added = {int(number): AddedToken(**token) for number, token in options["added_tokens_decoder"].items()}
    else:
        _merge_map(directory, options)
    defaults = {} if recipe is None else recipe.defaults
    named = {name: options.get(name, defaults.get(name)) for name in NAMED}
    extra = options.get("extra_special_tokens", options.get("additional_special_tokens")) or []
    if not isinstance(extra, list):
        raise UnsureError("special tokens with names of their own")
    return Settings(
        directory,
        recipe,
        options,
        added,
        {name: _token(value) for name, value in named.items() if value is not None},
        [_token(value) for value in extra],
        _chat_template(directory, options),
    )


def _read_optional(file: Path) -> dict[str, Any]:
    return read_json(file) if file.exists() else {}


def _merge_map(directory: Path, options: dict[str, Any]) -> None:
    """Older files have their special tokens in a file of their own."""
    if (directory / "added_tokens.json").exists():
        raise UnsureError("added_tokens.json, which has no order")
    for name, value in _read_optional(directory / "special_tokens_map.json").items():
        if name in NAMED and isinstance(value, dict):
            content = {key: entry for key, entry in value.items() if key != "special"}
            options[name] = AddedToken(**content, special=True)
        elif (name in NAMED and isinstance(value, str)) or (
            name == "additional_special_tokens" and all(isinstance(token, str) for token in value)
        ):
            options[name] = value
        else:
            raise UnsureError(f"special_tokens_map.json has {name}")


def _token(value: Any) -> Token:
    """A special token as it is in JSON: its text, or all of its properties."""
    if isinstance(value, str | AddedToken):
        return value
    if isinstance(value, Mapping) and value.get("__type") == "AddedToken":
        return AddedToken(**{name: entry for name, entry in value.items() if name != "__type"})
    raise UnsureError(f"{value} is no token")


def _chat_template(directory: Path, options: Mapping[str, Any]) -> str | None:
    """The chat template: of its own file, or among the settings, the one that is called default of several."""
    if (directory / "additional_chat_templates").exists():
        raise UnsureError("several chat templates")
    file = directory / "chat_template.jinja"
    if file.exists():
        return file.read_text(encoding="utf-8")
    found = options.get("chat_template")
    if isinstance(found, list):
        found = {entry["name"]: entry["template"] for entry in found}
    if isinstance(found, dict):
        found = found["default"]
    if found is not None and not isinstance(found, str):
        raise UnsureError("a chat template that is no text")
    return found
