"""Exports that can be talked to: a tokenizer of bytes, a chat template, and a model small enough to generate with."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lora_deploy.adapter import write_adapter
from lora_deploy.export import export_onnx
from tests.commands import command
from tests.conftest import random_adapter, save_tiny, tiny_model
from tests.export.conftest import adapter_dir, branch_export, tiny_export
from tests.train.conftest import CHATML

__all__ = [
    "adapter_dir",
    "branch_export",
    "byte_tokenizer",
    "command",
    "talking",
    "talking_branch",
    "talking_export",
    "tiny_export",
]

SPECIAL = ["<pad>", "<s>", "<|im_end|>", "<|im_start|>"]


def byte_tokenizer(chat_template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """One token a byte, so that an emoji is four of them; <|im_end|> is the end token."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *letters])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=chat_template,
    )


@pytest.fixture(scope="session")
def talking_export(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Path]]:
    """`talking_export(family)`: (base, export) with a tokenizer, made once. Do not change it."""
    made: dict[str, tuple[Path, Path]] = {}

    def make(family: str = "llama") -> tuple[Path, Path]:
        if family not in made:
            root = tmp_path_factory.mktemp(f"{family}-talks")
            base = save_tiny(family, "none", root / "base", vocab_size=260)
            byte_tokenizer().save_pretrained(base)
            export_onnx(base, output=root / "out")
            made[family] = (base, root / "out")
        return made[family]

    return make


@pytest.fixture(scope="session")
def talking_branch(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`talking_branch(branch, cache)`: a Llama with a tokenizer, adapters "a" and "b", made once; not to be changed."""
    made: dict[tuple[str, str], Path] = {}
    root = tmp_path_factory.mktemp("branch-talks")
    base = save_tiny("llama", "none", root / "base", vocab_size=260)
    byte_tokenizer().save_pretrained(base)
    adapters: dict[str, str | Path] = {"a": root / "a", "b": root / "b"}
    for seed, directory in enumerate(adapters.values(), start=1):
        write_adapter(random_adapter(tiny_model("llama", vocab_size=260), r=4 * seed, seed=seed), Path(directory))

    def make(branch: str = "hot-swap", cache: str = "growing") -> Path:
        if (branch, cache) not in made:
            options = {"merge": False, "branch": branch, "quantization": "nf4", "verify": False, "cache": cache}
            output = root / f"{branch}-{cache}"
            made[branch, cache] = export_onnx(base, adapters, output=output, **options).output  # type: ignore[arg-type]
        return made[branch, cache]

    return make


@pytest.fixture
def talking(talking_export: Callable[..., tuple[Path, Path]], tmp_path: Path) -> Path:
    """A copy of the Llama's export that the test may change."""
    return Path(shutil.copytree(talking_export()[1], tmp_path / "talking"))
