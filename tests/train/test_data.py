"""Reading JSONL, and which tokens are learned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from lora_deploy.data.examples import IGNORED, Example, Examples, load_examples, read_records, split_examples
from lora_deploy.errors import CheckpointError, DataError
from tests.train.conftest import CHATML, calls, char_tokenizer, write_jsonl

QA = {"prompt": "hello", "completion": "yes"}


def load(tmp_path: Path, *records: dict[str, Any], max_length: int = 200, **options: Any) -> Examples:
    tokenizer = options.pop("tokenizer", None) or char_tokenizer()
    return load_examples(write_jsonl(tmp_path / "d.jsonl", records), tokenizer, max_length, **options)


def text(example: Example) -> str:
    return char_tokenizer().decode(example.input_ids.tolist())


def learned(example: Example) -> str:
    """What the loss is on, with a bar where learned tokens do not follow each other."""
    pieces, at = [], None
    for index, label in enumerate(example.labels.tolist()):
        if label == IGNORED:
            continue
        assert label == int(example.input_ids[index])
        pieces += ["|"] if at is not None and index != at + 1 else []
        pieces.append(char_tokenizer().decode([label]))
        at = index
    return "".join(pieces)


def test_a_completion_is_learned_with_the_token_that_ends_it(tmp_path: Path) -> None:
    (example,) = load(tmp_path, QA, chat_template=False).kept
    assert text(example) == "helloyes<|im_end|>"
    assert learned(example) == "yes<|im_end|>"


def test_prompt_and_completion_become_a_chat_where_there_is_a_template(tmp_path: Path) -> None:
    (example,) = load(tmp_path, QA).kept
    assert text(example) == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n"
    assert learned(example) == "yes<|im_end|>"
    (plain,) = load(tmp_path, QA, tokenizer=char_tokenizer(chat_template=None)).kept
    assert text(plain) == "helloyes<|im_end|>"


def test_every_turn_of_the_assistant_is_learned_and_nothing_else(tmp_path: Path) -> None:
    roles = ["system", "user", "assistant", "user", "assistant"]
    messages = [{"role": role, "content": f"{role[0]}{index}"} for index, role in enumerate(roles)]
    (example,) = load(tmp_path, {"messages": messages}).kept
    assert learned(example) == "a2<|im_end|>|a4<|im_end|>"


def test_a_text_is_learned_as_a_whole(tmp_path: Path) -> None:
    (example,) = load(tmp_path, {"text": "once"}).kept
    assert text(example) == "once<|im_end|>"
    assert learned(example) == "nce<|im_end|>"  # Nothing comes before the first token.


def test_a_prompt_keeps_its_tokens_where_the_joint_text_would_merge_them(tmp_path: Path) -> None:
    bpe = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "ab": 2, "</s>": 3}, merges=[("a", "b")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="</s>")
    assert tokenizer.encode("ab") == [2]
    (example,) = load(tmp_path, {"prompt": "a", "completion": "b"}, tokenizer=tokenizer).kept
    assert example.input_ids.tolist() == [0, 1, 3]
    assert example.labels.tolist() == [IGNORED, 1, 3]


def test_a_generation_prompt_that_shows_more_than_the_answer_is_left_out(tmp_path: Path) -> None:
    asking = "{% if add_generation_prompt %}"
    template = CHATML.replace(f"{asking}<|im_start|>assistant\n", f"{asking}?")
    assert template != CHATML
    (example,) = load(tmp_path, QA, tokenizer=char_tokenizer(template)).kept
    assert learned(example) == "<|im_start|>assistant\nyes<|im_end|>"


def test_a_template_that_rewrites_the_past_is_refused(tmp_path: Path) -> None:
    template = "{% for message in messages %}{{ message['content'] if loop.last else '-' }}<|im_end|>{% endfor %}"
    messages = [{"role": role, "content": role} for role in ("user", "assistant", "user", "assistant")]
    with pytest.raises(DataError, match="does not keep the beginning") as caught:
        load(tmp_path, QA, {"messages": messages}, tokenizer=char_tokenizer(template))
    assert caught.value.details["file"].endswith("d.jsonl, line 1")


def test_a_template_that_refuses_the_roles_names_the_line(tmp_path: Path) -> None:
    template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
    messages = [{"role": "system", "content": "s"}, {"role": "assistant", "content": "a"}]
    with pytest.raises(DataError, match="refuses the messages") as caught:
        load(tmp_path, QA, {"messages": messages}, tokenizer=char_tokenizer(template))
    assert caught.value.details["file"].endswith("line 2")
    assert "no system" in caught.value.details["found"]


def test_messages_need_a_template(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no chat template"):
        load(tmp_path, {"messages": [{"role": "assistant", "content": "a"}]}, tokenizer=char_tokenizer(None))


def test_a_tokenizer_without_an_end_token_is_refused(tmp_path: Path) -> None:
    bpe = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "ab": 2}, merges=[("a", "b")]))
    with pytest.raises(CheckpointError, match="no end token"):
        load(tmp_path, {"text": "ab"}, tokenizer=PreTrainedTokenizerFast(tokenizer_object=bpe))


def test_what_is_cut_and_what_is_left_out_is_counted(tmp_path: Path) -> None:
    records = [QA, {"prompt": "p" * 30, "completion": "c"}, {"prompt": "p", "completion": "c" * 30}]
    found = load(tmp_path, *records, max_length=10, chat_template=False)
    assert [len(example) for example in found.kept] == [9, 10]
    assert (found.cut, found.dropped) == (2, 1)
    assert [line.split(": ")[1][:10] for line in found.warnings(Path("d"), 10)] == ["2 examples", "1 examples"]


@pytest.mark.parametrize(
    ("records", "found"), [([], "an empty file"), ([{"prompt": "p" * 30, "completion": "c"}], "1 records, none")]
)
def test_nothing_to_learn_is_an_error(tmp_path: Path, records: list[dict[str, str]], found: str) -> None:
    with pytest.raises(DataError, match="no example to learn from") as caught:
        load(tmp_path, *records, max_length=10)
    assert caught.value.details["found"].startswith(found)


def test_an_empty_completion_is_left_out(tmp_path: Path) -> None:
    for chat_template in (True, False):
        found = load(tmp_path, QA, {"prompt": "p", "completion": ""}, chat_template=chat_template)
        assert (len(found.kept), found.dropped) == (1, 1)


@pytest.mark.parametrize(
    ("line", "found"),
    [
        (b'{"text": ', "Expecting value"),
        (b'{"text": "\xff"}', "0xff"),
        (b'["text"]', "list"),
        (b"{}", "an empty record"),
        (b'{"text": "a", "source": "b"}', "the keys source, text"),
        (b'{"prompt": "a"}', "the keys prompt"),
        (b'{"text": 3}', "3"),
        (b'{"prompt": "a", "completion": null}', "None"),
        (b'{"messages": []}', "[]"),
        (b'{"messages": ["a"]}', "None"),
        (b'{"messages": [{"role": "user", "content": 1}]}', "1"),
        (b'{"messages": [{"role": "user", "content": "a"}]}', "the roles user"),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, line: bytes, found: str) -> None:
    file = tmp_path / "d.jsonl"
    file.write_bytes(b'{"text": "good"}\n\n' + line + b"\n")
    with pytest.raises(DataError) as caught:
        list(read_records(file))
    assert caught.value.details["file"] == f"{file}, line 3"
    assert found in caught.value.details["found"]
    assert caught.value.exit_code == 3


def test_blank_lines_and_a_byte_order_mark_are_skipped(tmp_path: Path) -> None:
    file = tmp_path / "d.jsonl"
    file.write_bytes("\ufeff".encode() + '{"text": "é"}\r\n \n\n{"text": "b"}'.encode())
    assert list(read_records(file)) == [(1, {"text": "é"}), (4, {"text": "b"})]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"No such file|cannot be read") as caught:
        list(read_records(tmp_path / "none.jsonl"))
    assert caught.value.details["file"] == str(tmp_path / "none.jsonl")


def test_the_split_is_decided_by_the_seed(tmp_path: Path) -> None:
    examples = load(tmp_path, *calls(20)).kept
    train, held = split_examples(examples, 0.25, seed=1)
    assert (len(train), len(held)) == (15, 5)
    assert {id(example) for example in train + held} == {id(example) for example in examples}
    assert [id(example) for example in split_examples(examples, 0.25, seed=1)[1]] == [id(example) for example in held]
    assert [id(example) for example in split_examples(examples, 0.25, seed=2)[1]] != [id(example) for example in held]
    assert split_examples(examples, 0.0, seed=1) == (examples, [])
    with pytest.raises(DataError, match="too few"):
        split_examples(examples[:1], 0.5, seed=1)
