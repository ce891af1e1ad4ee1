"""Regular expressions of strangers: none hangs, and what is matched without backtracking is matched as by `re`."""

from __future__ import annotations

import gc
import json
import re
import time
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_deploy.config import LoraConfig, pattern_matches
from lora_deploy.errors import ConfigError
from lora_deploy.patterns import Pattern, check_pattern
from tests.commands import assert_one_message, tree
from tests.faults.conftest import Place
from tests.faults.tally import Tally

LONG = "model.layers.0." + "a" * 60 + ".q_proj"
ENDLESS = [
    "(a+)+$",
    "(a*)*",
    "(a|a)+$",
    "(a|aa)+$",
    "([a-z]+)*x",
    r"(.*a){20}x",
    r"(\w+\.?)+$",
    "((a?){30}){30}",
    "(?:a{1,50}){1,50}x",
    "(?=(a+)+$)x",
    r"(?:(?=a+)a)+x",
    "(a+)?" * 30 + r"\1" * 30,
    "a" * 30_000,
]
KEYS = ["target_modules", "exclude_modules", "rank_pattern", "alpha_pattern", "layers_pattern"]


def _fields(key: str, pattern: str) -> dict[str, Any]:
    value: Any = {pattern: 3} if key in ("rank_pattern", "alpha_pattern") else pattern
    return {key: value} | ({"layers_to_transform": [0]} if key == "layers_pattern" else {})


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("pattern", ENDLESS, ids=lambda pattern: pattern[:20])
def test_a_pattern_that_could_take_for_ever_is_refused_by_key(
    pattern: str, key: str, place: Place, tally: Tally
) -> None:
    file = place.adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | _fields(key, pattern)))
    before = tree(place.root)
    gc.disable()  # a collection of all that earlier tests left takes a second by itself
    try:
        began = time.process_time()
        ended = place.export()
        seconds = time.process_time() - began
    finally:
        gc.enable()
    tally("pattern that could take for ever", ended.code == 3 and seconds < 1 and tree(place.root) == before)
    assert_one_message(ended, 3, file, f"{key}: ", "found:", "expected:", "remedy:")
    assert seconds < 1
    assert tree(place.root) == before


@pytest.mark.parametrize("pattern", [".*" * 12 + "x", "(?:.*a.*|.*b.*)" * 6 + "x", "(a?)" * 60 + "a" * 60 + "x"])
def test_a_pattern_of_many_ways_is_matched_or_given_up_in_a_second(pattern: str) -> None:
    """`re` would take hours for each of them."""
    config = LoraConfig(rank_pattern={pattern: 3})
    began = time.process_time()
    for layer in range(20):
        with suppress(ConfigError):
            assert config.rank(LONG.replace("0", str(layer))) == 8
    assert time.process_time() - began < 1


@pytest.mark.parametrize("key", ["rank_pattern", "target_modules"])
def test_too_many_patterns_are_refused(key: str) -> None:
    many = {f"layers.{number}.*": 2 for number in range(5000)}
    with pytest.raises(ConfigError, match="pattern"):
        LoraConfig(rank_pattern=many)


def test_a_name_longer_than_any_is_refused_by_name() -> None:
    with pytest.raises(ConfigError) as caught:
        pattern_matches("q_proj", "a" * 2000)
    assert "2000" in caught.value.details["found"]


def test_a_pattern_for_layers_that_names_the_group_is_refused() -> None:
    """The rule that it becomes a part of has a group of this name."""
    with pytest.raises(ConfigError) as caught:
        LoraConfig(layers_to_transform=[0], layers_pattern="(?P<index>layers)")
    assert caught.value.details["tensor"].startswith("layers_pattern")


# What tools write into `target_modules`: a fine-tuning tool for models of text and pictures, PEFT's documentation.
USEFUL = [
    r"(?:.*?(?:vision|image|visual|patch|vision_tower).*?(?:self_attn|attention|attn|mlp|ffn|dense).*?"
    r"(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\."
    r"(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense)\."
    r"(?:(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)))",
    r".*decoder.*(SelfAttention|EncDecAttention).*(q|v)$",
    r"^(?!.*lm_head).*\.(q_proj|v_proj)$",
    r"model\.layers\.(1[0-9]|2[0-3])\..*(?<!gate)_proj",
    r"(model\.)?layers\.\d+\.mlp\.(up|down)_proj",
    r".*\.(?:[0-9]|1[0-5])\.self_attn\.[qkv]_proj",
]
NAMES = [
    f"{root}.{layer}.{last}"
    for root in ("model.layers", "layers", "model.vision_tower.layers", "decoder.block")
    for layer in (0, 1, 12, 23)
    for last in ("self_attn.q_proj", "mlp.gate_proj", "mlp.up_proj", "EncDecAttention.v", "lm_head.v_proj", "attn")
]


@pytest.mark.parametrize("pattern", USEFUL, ids=lambda pattern: pattern[:20])
def test_useful_patterns_match_as_by_re(pattern: str) -> None:
    LoraConfig(target_modules=pattern)
    found = {name for name in NAMES if Pattern(pattern).fullmatch(name)}
    assert found == {name for name in NAMES if re.fullmatch(pattern, name)}
    assert 0 < len(found) < len(NAMES)


_ATOMS = st.sampled_from(
    [
        *("a", "b", ".", r"\.", "[ab]", "[^a]", r"\d", r"\W", "[a-c.]", "a?", "a*", "b+?", ".*", r"\w{1,2}", "a{2}"),
        *("^", "$", r"\b", r"\B", r"\Z", "(?=a)", "(?!b.)", "(?<=a)", "(?<!b)", "(?:ab|a)", "(a|b|)", "(?:)"),
        *("(?:ab){2,}", "(?=.*b)"),
    ]
)
_PATTERNS = st.lists(_ATOMS, min_size=1, max_size=7).map("".join)


@settings(max_examples=1500, deadline=None, database=None)
@given(
    pattern=st.one_of(_PATTERNS, st.lists(_PATTERNS, min_size=2, max_size=3).map("|".join)),
    name=st.text("ab.c1", max_size=9),
)
def test_sets_of_places_say_what_re_says(pattern: str, name: str) -> None:
    check_pattern(pattern)
    matcher = Pattern(pattern)
    matcher._quick = False
    assert matcher.fullmatch(name) == (re.fullmatch(pattern, name) is not None)
    assert matcher.matches_end(name) == (re.match(rf"(.*\.)?({pattern})$", name) is not None)
