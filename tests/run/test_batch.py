"""Several prompts in one run: each row is what it is alone, with the adapter of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from lora_deploy.errors import UsageError
from lora_deploy.run import OnnxModel

Branch = Callable[..., Path]
PROMPTS = ["Hi", "What is the time in the city of Paris?", "Write a short list.", "x"]


def _alone(model: OnnxModel, prompt: str, **options: int) -> str:
    return model.tokenizer.decode(
        list(model.generate_tokens(model.encode(prompt), **options)),  # type: ignore[arg-type]
        skip_special_tokens=True,
    )


@pytest.mark.parametrize("adapter", [None, "a", {"a": 0.5, "b": 0.5}], ids=str)
def test_rows_of_different_lengths_are_what_they_are_alone(
    adapter: str | dict[str, float] | None, talking_branch: Branch
) -> None:
    model = OnnxModel(talking_branch(), adapter)
    answers = model.generate_batch(PROMPTS, max_new_tokens=20)
    assert answers == [_alone(model, prompt, max_new_tokens=20) for prompt in PROMPTS]
    assert len(set(answers)) > 2
    assert model.tokens_per_second is not None


def test_one_row_is_generate(talking_branch: Branch) -> None:
    model = OnnxModel(talking_branch(), "b")
    assert model.generate_batch(["Hi"], max_new_tokens=12) == [model.generate("Hi", max_new_tokens=12)]
    options = {"chat_template": False}
    expected = [model.generate("Hi", max_new_tokens=12, **options)]
    assert model.generate_batch(["Hi"], max_new_tokens=12, **options) == expected


def test_rows_end_independently(talking_branch: Branch) -> None:
    """One row's end token stops that row only, and what comes after it does not change the others."""
    model = OnnxModel(talking_branch(), "a")
    model.eos_token_ids = set()
    free = [list(model.generate_tokens(model.encode(prompt), max_new_tokens=20)) for prompt in PROMPTS]
    (row, place, end) = next(
        (row, place, token)
        for row, tokens in enumerate(free)
        for place, token in enumerate(tokens[:15])
        if place > 1 and token not in tokens[:place] and any(token not in other for other in free)
    )
    model.eos_token_ids = {end}
    found = model.generate_batch(PROMPTS, max_new_tokens=20)
    for tokens, answer in zip(free, found, strict=True):
        kept = tokens[: tokens.index(end) + 1] if end in tokens else tokens
        assert answer == model.tokenizer.decode(kept, skip_special_tokens=True)
    assert len(free[row]) > place + 1


def _choices(model: OnnxModel, adapters: Sequence[str | None]) -> list[str]:
    answers = []
    for prompt, name in zip(PROMPTS, adapters, strict=True):
        model.set_adapter(name)
        answers.append(_alone(model, prompt, max_new_tokens=16))
    model.set_adapter(None)
    return answers


@pytest.mark.parametrize("cache", ["growing", "in-place"])
@pytest.mark.parametrize("adapters", [["a", "b", None, "a"], [None] * 4, ["b"] * 4], ids=str)
def test_a_mixed_batch_is_separate_runs(adapters: list[str | None], cache: str, talking_branch: Branch) -> None:
    pooled, swapped = OnnxModel(talking_branch("pooled", cache)), OnnxModel(talking_branch("hot-swap", cache))
    found = pooled.generate_batch(PROMPTS, adapters, max_new_tokens=16)
    assert found == _choices(pooled, adapters)
    assert found == _choices(swapped, adapters)


def test_the_adapter_that_is_set_is_that_of_every_row(talking_branch: Branch) -> None:
    """One id is for all rows."""
    pooled = OnnxModel(talking_branch("pooled"), "b")
    assert pooled.generate_batch(PROMPTS, max_new_tokens=9) == pooled.generate_batch(
        PROMPTS, ["b"] * 4, max_new_tokens=9
    )
    assert pooled.generate_batch(PROMPTS, [None] * 4, max_new_tokens=9) != pooled.generate_batch(
        PROMPTS, max_new_tokens=9
    )


def test_a_hot_swap_graph_runs_one_adapter_for_all_rows(talking_branch: Branch) -> None:
    model = OnnxModel(talking_branch())
    with pytest.raises(UsageError, match="only a pooled graph") as caught:
        model.generate_batch(PROMPTS, ["a", "b", "a", "b"])
    assert "--pool" in caught.value.details["remedy"]
    found = model.generate_batch(PROMPTS, ["a"] * 4, max_new_tokens=9)
    model.set_adapter("a")
    assert found == model.generate_batch(PROMPTS, max_new_tokens=9)


@pytest.mark.parametrize("branch", ["hot-swap", "pooled"])
def test_adapters_that_do_not_go_with_the_prompts_are_refused(branch: str, talking_branch: Branch) -> None:
    model = OnnxModel(talking_branch(branch))
    for adapters in ([], ["a"], ["a"] * 5):
        with pytest.raises(UsageError, match="each prompt needs one adapter"):
            model.generate_batch(PROMPTS, adapters)
    with pytest.raises(UsageError, match="no such adapter"):
        model.generate_batch(PROMPTS, ["none"] * 4)


@pytest.mark.parametrize("branch", ["hot-swap", "pooled"])
def test_nothing_to_answer_is_an_error_of_usage(branch: str, talking_branch: Branch) -> None:
    model = OnnxModel(talking_branch(branch))
    for adapters in (None, []):
        with pytest.raises(UsageError, match="cannot be generated from") as caught:
            model.generate_batch([], adapters)
        assert "no prompt tokens" in caught.value.details["found"]
    with pytest.raises(UsageError, match="cannot be generated from"):
        model.generate_batch(["Hi", ""], chat_template=False)
    with pytest.raises(UsageError, match="cannot be generated from"):
        model.generate_batch(["Hi"], max_new_tokens=0)


@pytest.mark.parametrize("cache", ["growing", "in-place"])
def test_each_row_ends_with_its_own_context(cache: str, talking_branch: Branch) -> None:
    """A long prompt beside it does not cut a short one's answer."""
    model = OnnxModel(talking_branch("hot-swap", cache))
    model.eos_token_ids = set()
    rows = ["a" * 120, "bc"]
    found = model.generate_batch(rows, max_new_tokens=40, chat_template=False)
    lengths = []
    for prompt, answer in zip(rows, found, strict=True):
        tokens = list(model.generate_tokens(model.encode(prompt, chat_template=False), max_new_tokens=40))
        assert answer == model.tokenizer.decode(tokens, skip_special_tokens=True)
        lengths.append(len(tokens))
    assert lengths == [9, 40]
    with pytest.raises(UsageError, match="longer than the model's context"):
        model.generate_batch(["Hi", "a" * 129], chat_template=False)


@pytest.mark.parametrize("cache", ["growing", "in-place"])
def test_rows_of_a_pool_keep_their_adapters_near_the_end_of_the_context(cache: str, talking_branch: Branch) -> None:
    pooled, swapped = OnnxModel(talking_branch("pooled", cache)), OnnxModel(talking_branch())
    rows, adapters = ["a" * 120, "bc", "bc", "bc"], ["a", "b", None, "a"]
    pooled.eos_token_ids = swapped.eos_token_ids = set()
    found = pooled.generate_batch(rows, adapters, max_new_tokens=20, chat_template=False)
    for prompt, name, answer in zip(rows, adapters, found, strict=True):
        swapped.set_adapter(name)
        assert answer == swapped.generate(prompt, max_new_tokens=20, chat_template=False)
    assert len(set(found)) == 4
    pooled.set_adapter("b")  # one id for all rows
    swapped.set_adapter("b")
    found = pooled.generate_batch(rows[:2], max_new_tokens=20, chat_template=False)
    assert found == [swapped.generate(row, max_new_tokens=20, chat_template=False) for row in rows[:2]]


def test_sampling_a_batch_is_repeatable_with_a_seed(talking_branch: Branch) -> None:
    model = OnnxModel(talking_branch("pooled"))
    options = {"max_new_tokens": 12, "temperature": 5.0}
    adapters = ["a", "b", None, "a"]
    first = model.generate_batch(PROMPTS, adapters, seed=1, **options)  # type: ignore[arg-type]
    assert model.generate_batch(PROMPTS, adapters, seed=1, **options) == first  # type: ignore[arg-type]
    assert model.generate_batch(PROMPTS, adapters, seed=2, **options) != first  # type: ignore[arg-type]
