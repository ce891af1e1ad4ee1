"""A tokenizer of single characters, tiny bases that have it, and training data."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lora_deploy.train import TrainOptions
from tests.conftest import VOCABULARY, save_tiny

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def char_tokenizer(chat_template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """One token a character; <|im_end|> is the end token."""
    special = ["<pad>", "<s>", "<|im_end|>", "<|im_start|>", "<unk>"]
    letters = ["\n", *(chr(code) for code in range(32, 127))]
    vocabulary = {token: index for index, token in enumerate([*special, *letters])}
    assert len(vocabulary) <= VOCABULARY
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="<|im_end|>",
        unk_token="<unk>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=chat_template,
    )


def write_jsonl(file: Path, records: Sequence[dict[str, Any]]) -> Path:
    """Write records one a line."""
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return file


def calls(count: int = 10) -> list[dict[str, str]]:
    """Records of different lengths that teach one answer."""
    sizes = [(1 + index % 4, 1 + index % 3) for index in range(count)]
    return [{"prompt": "x" * long + str(index), "completion": "ab" * wide} for index, (long, wide) in enumerate(sizes)]


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """`tiny_base(method="none")`: directory of a tiny Llama with a tokenizer, made once. Do not change it."""
    made: dict[str, str] = {}

    def make(method: str = "none") -> str:
        if method not in made:
            directory = save_tiny("llama", method, tmp_path_factory.mktemp(f"base-{method}"))
            char_tokenizer().save_pretrained(directory)
            made[method] = str(directory)
        return made[method]

    return make


@pytest.fixture
def options(tiny_base: Callable[..., str], tmp_path: Path) -> Callable[..., TrainOptions]:
    """`options(**changes)`: of a short run with dropout, shuffling and accumulation over more than an epoch."""
    data = write_jsonl(tmp_path / "data.jsonl", calls())

    def make(**changes: Any) -> TrainOptions:
        values: dict[str, Any] = {
            "model": tiny_base(),
            "data": data,
            "output": tmp_path / "out",
            "rank": 4,
            "dropout": 0.2,
            "batch_size": 2,
            "gradient_accumulation": 2,
            "max_steps": 6,
            "save_steps": 1,
            "keep_checkpoints": 9,
            "learning_rate": 1e-2,
            "device": "cpu",
        }
        if "lora" in changes:
            del values["rank"], values["dropout"]
        return TrainOptions(**(values | changes))

    return make


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tiny matrices on one thread: the threads of several would wait for each other most of the time."""
    threads = torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # of subprocesses
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
