"""The light tokenizer gives what transformers' AutoTokenizer gives, for every class and setting that it takes on."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, processors
from transformers import AutoTokenizer
from transformers.models.auto import tokenization_auto

from lora_deploy.errors import CheckpointError
from lora_deploy.tokenizer import LightTokenizer, load_tokenizer
from lora_deploy.tokenizer.choice import RECIPES, REGISTERED, WRONG_ON_HUB, choose_class
from tests.tokenizer import made
from tests.tokenizer.same import assert_same, both
from tests.train.conftest import CHATML

NAMED = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
ENDS = {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
TAGS = NAMED | {"cls_token": "<s>", "sep_token": "</s>", "mask_token": "<mask>"}
# class, what is written, the model, special tokens
CLASSES: dict[str, tuple[Callable[[], Tokenizer], str, dict[str, Any]]] = {
    "TokenizersBackend": (made.byte_level, "llama", ENDS),
    "GPT2Tokenizer": (made.byte_level, "llama", ENDS),
    "GPTNeoXTokenizer": (made.byte_level, "gpt_neox", ENDS),
    "Qwen2Tokenizer": (made.byte_level, "qwen2", ENDS),
    "LlamaTokenizer": (made.sentence_pieces, "llama", NAMED),
    "GemmaTokenizer": (made.sentence_pieces, "gemma2", NAMED),
    "RobertaTokenizer": (made.byte_level, "roberta", TAGS),
    "BertTokenizer": (made.words, "bert", {}),
}
# Settings of each, one at a time.
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *[(name, {}) for name in CLASSES],
    *[(name, {"add_prefix_space": True}) for name in CLASSES if name != "BertTokenizer"],
    *[(name, {"split_special_tokens": True}) for name in ("TokenizersBackend", "GPT2Tokenizer", "BertTokenizer")],
    *[(name, {"clean_up_tokenization_spaces": True}) for name in ("GPT2Tokenizer", "BertTokenizer")],
    *[(name, {"padding_side": "left"}) for name in ("GPT2Tokenizer", "BertTokenizer")],
    *[(name, {"extra_special_tokens": ["<tool>", "new one"]}) for name in ("TokenizersBackend", "Qwen2Tokenizer")],
    *[(name, {"additional_special_tokens": ["<tool>"]}) for name in ("TokenizersBackend", "LlamaTokenizer")],
    *[(name, {"add_bos_token": True, "add_eos_token": True}) for name in ("GPT2Tokenizer", "LlamaTokenizer")],
    *[(name, {"model_input_names": ["input_ids", "attention_mask", "token_type_ids"]}) for name in CLASSES],
    ("LlamaTokenizer", {"legacy": True}),
    ("LlamaTokenizer", {"add_prefix_space": False}),
    ("GPTNeoXTokenizer", {"trim_offsets": False}),
    ("BertTokenizer", {"do_lower_case": False, "strip_accents": True}),
    ("BertTokenizer", {"strip_accents": False, "tokenize_chinese_chars": False}),
    ("BertTokenizer", {"model_input_names": ["input_ids", "attention_mask"]}),
    ("TokenizersBackend", {"model_max_length": 77, "bos_token": None}),
    ("TokenizersBackend", {"max_len": 78}),
    ("TokenizersBackend", {"unk_token": {"__type": "AddedToken", "content": "<odd>", "lstrip": True}}),
    ("GPT2Tokenizer", {"eos_token": "<not there>", "pad_token": None}),
    (
        "GPT2Tokenizer",
        {
            "clean_up_tokenization_spaces": True,
            "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output": True,
        },
    ),
    ("TokenizersBackend", {"chat_template": [{"name": "default", "template": CHATML}, {"name": "b", "template": "b"}]}),
]


def write(directory: Path, name: str, **options: Any) -> Path:
    make, model, named = CLASSES[name]
    return made.write(directory, make(), model, name, **named | options)


@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=str)
def test_the_same_as_transformers(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    directory = write(tmp_path, name, **options)
    assert type(both(directory)[1]).__name__ == name
    assert_same(directory)


def test_every_class_is_compared() -> None:
    assert CLASSES.keys() == RECIPES.keys()


@pytest.mark.parametrize("name", [name for name in CLASSES if name not in ("TokenizersBackend", "BertTokenizer")])
def test_control_a_class_decides_more_than_its_file(name: str, tmp_path: Path) -> None:
    """What the file alone would give is something else, so that the comparison would show it."""
    light, _ = both(write(tmp_path, name))
    stored = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert any(stored.encode(text).ids != light.encode(text) for text in made.TEXTS)


@pytest.mark.parametrize("name", ["TokenizersBackend", "GPT2Tokenizer", "Qwen2Tokenizer", "LlamaTokenizer"])
def test_added_tokens_of_the_settings_come_before_those_of_the_file(name: str, tmp_path: Path) -> None:
    first = {"content": "fox", "lstrip": True, "normalized": False, "rstrip": False, "single_word": True}
    second = {"content": "<|im_end|>", "lstrip": False, "normalized": False, "rstrip": True, "single_word": False}
    added = {"9": first | {"special": False}, "6": second | {"special": True}, "5000": second | {"content": "<late>"}}
    assert_same(write(tmp_path, name, added_tokens_decoder=added))


@pytest.mark.parametrize("name", ["TokenizersBackend", "GPT2Tokenizer", "BertTokenizer"])
def test_older_files_with_their_special_tokens_in_a_file_of_their_own(name: str, tmp_path: Path) -> None:
    directory = write(tmp_path, name)
    odd = {"content": "<tool>", "lstrip": True, "normalized": False, "rstrip": False, "single_word": False}
    tokens = {"mask_token": odd, "eos_token": "</s>" if name != "BertTokenizer" else "[SEP]"}
    tokens["additional_special_tokens"] = ["<|im_start|>", "one more"]
    (directory / "special_tokens_map.json").write_text(json.dumps(tokens))
    assert_same(directory)


def test_the_template_of_its_own_file_is_the_one(tmp_path: Path) -> None:
    directory = write(tmp_path, "TokenizersBackend")
    (directory / "chat_template.jinja").write_text("{{ bos_token }}{{ messages[0]['content'] }}")
    assert_same(directory)
    assert both(directory)[0].apply_chat_template(made.CHATS[2], tokenize=False) == "<|endoftext|>a"


def test_no_chat_template(tmp_path: Path) -> None:
    light, whole = both(write(tmp_path, "GPT2Tokenizer", chat_template=None))
    assert light.chat_template is whole.chat_template is None
    with pytest.raises(ValueError, match="no chat template"):
        light.apply_chat_template(made.CHATS[0])


@pytest.mark.parametrize("name", ["TokenizersBackend", "GPT2Tokenizer"])
def test_a_file_without_a_post_processor(name: str, tmp_path: Path) -> None:
    make, model, named = CLASSES[name]
    assert make().post_processor is None
    tokenizer = make()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    assert_same(made.write(tmp_path / "trimmed", tokenizer, model, name, **named))


@pytest.mark.parametrize("name", ["TokenizersBackend", "GPT2Tokenizer"])
def test_a_file_that_pads_and_cuts(name: str, tmp_path: Path) -> None:
    make, model, named = CLASSES[name]
    tokenizer = make()
    tokenizer.enable_padding(direction="left", pad_id=3, pad_token="<pad>", length=40)
    tokenizer.enable_truncation(4)
    assert_same(made.write(tmp_path, tokenizer, model, name, padding_side="right", **named))
    assert not isinstance(load_tokenizer(made.write(tmp_path / "b", tokenizer, model, name, **named)), LightTokenizer)


def test_the_table_of_classes_is_that_of_transformers() -> None:
    for model, name in REGISTERED.items():
        assert tokenization_auto.TOKENIZER_MAPPING_NAMES.get(model) == name, model
    assert REGISTERED.keys() & tokenization_auto.MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS == WRONG_ON_HUB


# One model of each kind: which class is registered, and whether it is believed.
KINDS = {(name, model in WRONG_ON_HUB): model for model, name in REGISTERED.items()}


@pytest.mark.parametrize("model", KINDS.values())
def test_the_class_is_the_one_that_transformers_takes(model: str, tmp_path: Path) -> None:
    ours: dict[str, str] = {}
    theirs: dict[str, str] = {}
    classes = [*RECIPES, "PreTrainedTokenizerFast", "GPT2TokenizerFast", "LlamaTokenizerFast", None]
    for kind in (made.byte_level, made.sentence_pieces, made.words):
        tokenizer = kind()
        for name in classes:
            directory = made.write(tmp_path, tokenizer, model, name)
            key = f"{kind.__name__} {name}"
            settings = json.loads((directory / "tokenizer_config.json").read_text())
            with suppress(Exception):  # a class that cannot read this vocabulary
                theirs[key] = type(AutoTokenizer.from_pretrained(directory)).__name__
                ours[key] = choose_class(directory, {"model_type": model}, settings)
    assert ours == theirs
    assert len(ours) > 20


# What is changed in which file, and makes the light tokenizer unsure.
UNSURE: list[tuple[str, dict[str, Any]]] = [
    ("tokenizer_config.json", {"fix_mistral_regex": True}),
    ("tokenizer_config.json", {"image_token": "<tool>"}),
    ("tokenizer_config.json", {"extra_special_tokens": {"a_token": "<tool>"}}),
    ("tokenizer_config.json", {"tokenizer_class": "CohereTokenizer"}),
    ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["a.B", None]}}),
    ("config.json", {"model_type": "bloom"}),
    ("config.json", {"model_name": "qwen2"}),
    ("added_tokens.json", {"<tool>": 444}),
]


@pytest.mark.parametrize(("name", "values"), UNSURE, ids=str)
def test_what_is_not_sure_is_left_to_transformers(name: str, values: dict[str, Any], tmp_path: Path) -> None:
    directory = write(tmp_path, "TokenizersBackend")
    file = directory / name
    content = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(content | values))
    found = load_tokenizer(directory)
    assert not isinstance(found, LightTokenizer)
    expected = AutoTokenizer.from_pretrained(directory)
    assert type(found) is type(expected)
    assert [found(text)["input_ids"] for text in made.TEXTS] == [expected(text)["input_ids"] for text in made.TEXTS]


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_what_neither_can_read_is_an_error_of_the_export(name: str, tmp_path: Path) -> None:
    (write(tmp_path, "TokenizersBackend") / name).write_text("{")
    with pytest.raises(CheckpointError, match="no tokenizer that can be read"):
        load_tokenizer(tmp_path)
