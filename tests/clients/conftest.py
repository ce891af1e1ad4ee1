"""Tiny exports of each mode, and what our own client answers from them, which others are held to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from lora_deploy.export import export_onnx
from lora_deploy.run import OnnxModel
from tests.run.conftest import talking_branch

__all__ = ["POOL", "Answers", "exports", "ours", "prompts", "talking_branch"]

NEW_TOKENS = 16
POOL = ("a", "b")  # the adapters of the branches, in the order of a pool's ids

# By mode and adapter, None for the bare base: the new tokens of each prompt, up to and including the end token.
Answers = dict[str, dict[str | None, list[list[int]]]]


class Prompts(NamedTuple):
    """What is asked.

    Attributes:
        ids: Tokens of each.
        ends: The tokens that end an answer.
    """

    ids: list[list[int]]
    ends: set[int]


@pytest.fixture(scope="session")
def exports(talking_branch: Callable[..., Path]) -> dict[str, Path]:
    """The exports by mode: adapter "a" merged, and "a" and "b" hot-swapped and pooled. Do not change them."""
    swapped = talking_branch("hot-swap")
    root = swapped.parent
    merged = export_onnx(root / "base", root / "a", output=root / "merged", quantization="nf4", verify=False)
    return {"merge": merged.output, "hot-swap": swapped, "pooled": talking_branch("pooled")}


@pytest.fixture(scope="session")
def prompts(exports: dict[str, Path]) -> Prompts:
    """Three, of different lengths."""
    model = OnnxModel(exports["merge"])
    return Prompts([model.encode(text) for text in ("Ask us", "stop there", "2 + 2, please")], model.eos_token_ids)


@pytest.fixture(scope="session")
def ours(exports: dict[str, Path], prompts: Prompts) -> Answers:
    """What `OnnxModel` answers: no two adapters alike, nor one and the bare base; some answers end early."""
    answers: Answers = {}
    for mode, directory in exports.items():
        model = OnnxModel(directory)
        for adapter in ("a",) if mode == "merge" else (None, *POOL):
            if mode != "merge":
                model.set_adapter(adapter)
            found = [list(model.generate_tokens(ids, max_new_tokens=NEW_TOKENS)) for ids in prompts.ids]
            answers.setdefault(mode, {})[adapter] = found
    assert answers["hot-swap"] == answers["pooled"]
    assert answers["merge"]["a"] == answers["pooled"]["a"]
    for several in zip(*answers["pooled"].values(), strict=True):
        assert len(set(map(tuple, several))) == len(several)
    assert {len(answer) < NEW_TOKENS for found in answers["pooled"].values() for answer in found} == {True, False}
    return answers
