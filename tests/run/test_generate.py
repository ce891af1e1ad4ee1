"""Generation: the tokens that transformers generates, where it stops, and the text that comes out piece by piece."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from lora_deploy.errors import CheckpointError, UsageError
from lora_deploy.export import export_onnx
from lora_deploy.run import OnnxModel
from tests.commands import Command, assert_one_message
from tests.conftest import TINY_FAMILIES
from tests.run.conftest import byte_tokenizer

Talking = Callable[..., tuple[Path, Path]]
PROMPT = "What is the time?"


def _tokens(model: OnnxModel, **options: object) -> list[int]:
    return list(model.generate_tokens(model.encode(PROMPT), **options))  # type: ignore[arg-type]


def _set(file: Path, **values: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_greedy_tokens_are_those_of_transformers(family: str, talking_export: Talking) -> None:
    base, export = talking_export(family)
    model = OnnxModel(export)
    prompt = model.encode(PROMPT)
    reference = AutoModelForCausalLM.from_pretrained(base)
    generated = reference.generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), do_sample=False, max_new_tokens=30
    )[0, len(prompt) :]
    found = _tokens(model, max_new_tokens=30)
    assert found == generated.tolist()
    assert len(set(found)) > 3  # no constant, which a lost cache would give as well


def test_the_prompt_is_the_users_turn_of_the_chat_template(talking: Path) -> None:
    model = OnnxModel(talking)
    turn = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    system = "<|im_start|>system\nBe brief.<|im_end|>\n"
    decode = model.tokenizer.decode
    assert decode(model.encode("Hi")) == turn
    assert decode(model.encode("Hi", system="Be brief.")) == system + turn
    assert decode(model.encode("Hi", chat_template=False)) == "Hi"
    (talking / "chat_template.jinja").unlink()
    assert decode(OnnxModel(talking).encode("Hi")) == "Hi"


@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
@pytest.mark.parametrize("as_list", [False, True])
def test_generation_ends_with_an_end_token(file: str, as_list: bool, talking: Path) -> None:
    free = _tokens(OnnxModel(talking), max_new_tokens=30)
    position = next(i for i in range(4, 30) if free[i] not in free[:i])
    end = free[position]
    if file == "config.json":
        (talking / "generation_config.json").unlink()
    _set(talking / file, eos_token_id=[259, end] if as_list else end)
    model = OnnxModel(talking)
    assert model.eos_token_ids == ({259, end} if as_list else {end})
    assert _tokens(model, max_new_tokens=30) == free[: position + 1]


def test_without_a_configuration_the_tokenizers_end_token_ends(talking: Path) -> None:
    (talking / "generation_config.json").unlink()
    _set(talking / "config.json", eos_token_id=None)
    assert OnnxModel(talking).eos_token_ids == {2}


@pytest.mark.parametrize("count", [1, 2, 9])
def test_no_more_tokens_are_made_than_asked_for(count: int, talking_export: Talking) -> None:
    model = OnnxModel(talking_export()[1])
    assert _tokens(model, max_new_tokens=count) == _tokens(model, max_new_tokens=20)[:count]


def test_generation_ends_with_the_models_context(talking_export: Talking) -> None:
    for family, limit in (("llama", 128), ("gpt2", 128)):
        model = OnnxModel(talking_export(family)[1])
        model.eos_token_ids = set()
        assert model.context_length == limit
        # The last token is made of a full context and is not read itself.
        assert len(list(model.generate_tokens([5] * (limit - 3), max_new_tokens=50))) == 4
        assert len(list(model.generate_tokens([5] * limit, max_new_tokens=50))) == 1
        with pytest.raises(UsageError, match="longer than the model's context"):
            next(model.generate_tokens([5] * (limit + 1)))


def test_the_speed_is_of_the_last_generation(talking_export: Talking) -> None:
    model = OnnxModel(talking_export()[1])
    assert model.tokens_per_second is None
    _tokens(model, max_new_tokens=5)
    assert model.tokens_per_second is not None
    assert model.tokens_per_second > 0
    _tokens(model, max_new_tokens=1)
    assert model.tokens_per_second is None


def test_sampling_is_repeatable_with_a_seed_and_only_with_it(talking_export: Talking) -> None:
    model = OnnxModel(talking_export()[1])
    model.eos_token_ids = set()
    options = {"max_new_tokens": 20, "temperature": 5.0}
    first = _tokens(model, seed=3, **options)
    assert _tokens(model, seed=3, **options) == first
    assert _tokens(model, seed=4, **options) != first
    assert _tokens(model, **options) != _tokens(model, **options)


def test_the_one_most_probable_token_is_greedy(talking_export: Talking) -> None:
    model = OnnxModel(talking_export()[1])
    greedy = _tokens(model, max_new_tokens=20)
    assert _tokens(model, max_new_tokens=20, temperature=2.0, top_k=1) == greedy
    assert _tokens(model, max_new_tokens=20, temperature=2.0, top_p=1e-9) == greedy
    assert _tokens(model, max_new_tokens=20, temperature=9.0, seed=0) != greedy


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"max_new_tokens": 0},
        {"seed": -1},
    ],
)
def test_a_setting_out_of_range_is_an_error_of_usage(wrong: dict[str, float], talking_export: Talking) -> None:
    with pytest.raises(UsageError, match="cannot be generated"):
        _tokens(OnnxModel(talking_export()[1]), **wrong)


def test_an_empty_prompt_is_an_error_of_usage(talking_export: Talking) -> None:
    with pytest.raises(UsageError, match="cannot be generated"):
        OnnxModel(talking_export()[1]).generate("", chat_template=False)


TEXTS = ["plain", "größer", "a 😀 b", "😀😀", "👩\u200d👩\u200d👧 famille", "日本語", "ends with a 😀"]


def _say(model: OnnxModel, tokens: list[int], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    def generate_tokens(prompt: list[int], **options: object) -> Iterator[int]:
        yield from tokens

    monkeypatch.setattr(model, "generate_tokens", generate_tokens)
    return list(model.stream("x"))


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_join_to_the_text_and_no_character_is_ever_broken(
    text: str, talking_export: Talking, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = OnnxModel(talking_export()[1])
    tokens = model.tokenizer(text)["input_ids"]
    assert len(tokens) == len(text.encode())
    pieces = _say(model, [*tokens, 2], monkeypatch)
    assert "".join(pieces) == text
    assert len(pieces) == len(text)  # as soon as each character is whole
    assert model.generate("x") == text


def test_a_character_that_stays_broken_is_shown_at_the_end_not_lost(
    talking_export: Talking, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = OnnxModel(talking_export()[1])
    tokens = model.tokenizer("a😀")["input_ids"][:3]
    assert "".join(_say(model, tokens, monkeypatch)) == model.tokenizer.decode(tokens)
    assert model.tokenizer.decode(tokens).startswith("a\ufffd")


def test_generated_text_is_the_decoded_tokens(talking_export: Talking) -> None:
    model = OnnxModel(talking_export()[1])
    tokens = _tokens(model, max_new_tokens=40)
    text = model.tokenizer.decode(tokens, skip_special_tokens=True)
    assert model.generate(PROMPT, max_new_tokens=40) == text
    assert "".join(model.stream(PROMPT, max_new_tokens=40)) == text


def test_the_command_prints_what_the_model_generates(talking: Path, command: Command) -> None:
    text = OnnxModel(talking).generate(PROMPT, max_new_tokens=8, temperature=3.0, top_k=9, top_p=0.9, seed=5)
    flags = ["--max-new-tokens", 8, "--temperature", 3, "--top-k", 9, "--top-p", 0.9, "--seed", 5]
    ended = command("run", talking, "--prompt", PROMPT, *flags)
    assert (ended.code, ended.out) == (0, text + "\n")
    assert "tokens/s]" in ended.err
    assert command("run", talking, "--prompt", PROMPT, *flags, "--quiet") == (0, text + "\n", "")
    printed = json.loads(command("run", talking, "--prompt", PROMPT, *flags, "--json").out)
    assert printed.keys() == {"text", "tokens_per_second"}
    assert printed["text"] == text
    plain = OnnxModel(talking).generate(PROMPT, max_new_tokens=8, chat_template=False)
    assert command("run", talking, "--prompt", PROMPT, "--max-new-tokens", 8, "--no-chat-template").out == plain + "\n"
    brief = OnnxModel(talking).generate(PROMPT, max_new_tokens=8, system="Be brief.")
    assert command("run", talking, "--prompt", PROMPT, "--max-new-tokens", 8, "--system", "Be brief.").out[:-1] == brief


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer.json"])
def test_a_damaged_file_beside_the_model_is_bad_input(name: str, talking: Path, command: Command) -> None:
    (talking / name).write_text("{")
    assert_one_message(command("run", talking, "--prompt", "x"), 3, talking)


def test_an_export_without_a_tokenizer_says_what_it_lacks(talking: Path) -> None:
    for file in (*talking.glob("tokenizer*"), *talking.glob("chat*"), *talking.glob("special*")):
        file.unlink()
    with pytest.raises(CheckpointError, match="no tokenizer") as caught:
        OnnxModel(talking)
    assert caught.value.details["file"] == str(talking)


@pytest.mark.parametrize("end", [2, [2, "free"]])
def test_onnxruntime_genai_opens_the_directory_and_makes_the_same_tokens(
    end: object, talking_export: Talking, tmp_path: Path
) -> None:
    """Also where only generation_config.json knows the token that ends an answer."""
    genai = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")
    base, export = talking_export()
    prompt = byte_tokenizer()(PROMPT)["input_ids"]
    expected = list(OnnxModel(export).generate_tokens(prompt, max_new_tokens=25))
    if isinstance(end, list):
        position = next(i for i in range(4, 25) if expected[i] not in expected[:i])
        base = Path(shutil.copytree(base, tmp_path / "base"))
        _set(base / "generation_config.json", eos_token_id=[2, expected[position]])
        export = export_onnx(base, output=tmp_path / "out", verify=False).output
        expected = expected[: position + 1]
        assert list(OnnxModel(export).generate_tokens(prompt, max_new_tokens=25)) == expected
        expected.pop()  # onnxruntime-genai ends at the end token and leaves it out
    model = genai.Model(str(export))
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=len(prompt) + 25)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(np.array([prompt], np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    assert generator.get_sequence(0)[len(prompt) :].tolist() == expected
    assert genai.Tokenizer(model).encode(PROMPT).tolist() == prompt


def test_a_system_message_that_cannot_be_given_is_refused(talking: Path) -> None:
    with pytest.raises(UsageError, match="needs a chat template"):
        OnnxModel(talking).encode("Hi", chat_template=False, system="Be brief.")
    refusing = "{{ raise_exception('no system here') if messages[0]['role'] == 'system' else messages[0]['content'] }}"
    (talking / "chat_template.jinja").write_text(refusing)
    with pytest.raises(UsageError, match="refuses the messages"):
        OnnxModel(talking).encode("Hi", system="Be brief.")
    assert OnnxModel(talking).encode("Hi")
