"""adapter_config.json: PEFT's fields and defaults, and strictness where PEFT is lenient."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import peft
import pytest

from lora_deploy.config import CONFIG_NAME, LoraConfig
from lora_deploy.errors import ConfigError

FULL: dict[str, Any] = {
    "r": 4,
    "lora_alpha": 10,
    "lora_dropout": 0.1,
    "target_modules": ["v_proj", "q_proj"],
    "exclude_modules": ["layers.1.v_proj"],
    "layers_to_transform": [1, 0],
    "layers_pattern": "layers",
    "bias": "lora_only",
    "modules_to_save": ["lm_head"],
    "init_lora_weights": "gaussian",
    "use_rslora": True,
    "rank_pattern": {"q_proj": 2},
    "alpha_pattern": {"v_proj": 3},
    "base_model_name_or_path": "someone/base",
    "revision": "main",
    "task_type": "CAUSAL_LM",
}


def _write(directory: Path, **values: Any) -> Path:
    (directory / CONFIG_NAME).write_text(json.dumps(values))
    return directory


def test_the_config_that_peft_writes_by_default_comes_back_to_peft_as_it_was(tmp_path: Path) -> None:
    theirs = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj"], inference_mode=True)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = LoraConfig.load(tmp_path / "theirs")
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / CONFIG_NAME).write_text(ours.to_json())
    assert peft.LoraConfig.from_pretrained(tmp_path / "ours") == theirs


def test_a_config_with_every_supported_field_set_goes_through_peft_unchanged(tmp_path: Path) -> None:
    ours = LoraConfig(**FULL)
    _write(tmp_path, **json.loads(ours.to_json()))
    theirs = peft.LoraConfig.from_pretrained(tmp_path)
    as_peft_has_it = {name: getattr(theirs, name) for name in FULL}
    assert as_peft_has_it == FULL | {"target_modules": {"q_proj", "v_proj"}, "exclude_modules": {"layers.1.v_proj"}}
    theirs.save_pretrained(tmp_path)
    assert json.loads(LoraConfig.load(tmp_path).to_json()).items() >= json.loads(ours.to_json()).items()


def test_the_defaults_are_pefts_but_for_the_targets_and_the_task() -> None:
    theirs = peft.LoraConfig()
    differing = {
        name
        for name in LoraConfig.model_fields
        if name != "merge_weights" and getattr(LoraConfig(), name) != getattr(theirs, name)
    }
    assert differing == {"target_modules", "task_type"}


def test_json_is_sorted_and_does_not_depend_on_the_order_of_the_targets() -> None:
    one = LoraConfig(target_modules=["b", "a", "c"], exclude_modules=["n", "m"]).to_json()
    two = LoraConfig(target_modules={"c", "b", "a"}, exclude_modules=["m", "n"]).to_json()
    assert one == two
    assert json.loads(one)["target_modules"] == ["a", "b", "c"]
    keys = list(json.loads(one))
    assert keys == sorted(keys)
    assert "\n  " in one


def test_merge_weights_is_written_only_where_it_is_set_since_peft_does_not_know_it() -> None:
    assert "merge_weights" not in json.loads(LoraConfig().to_json())
    assert LoraConfig(**json.loads(LoraConfig(merge_weights=True).to_json())).merge_weights


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("target_parameters", ["experts.weight"]),
        ("layer_replication", [[0, 1]]),
        ("megatron_config", {"a": 1}),
        ("use_qalora", True),
        ("a_key_of_tomorrow", 0.5),
        ("a_key_of_tomorrow", 0),
    ],
)
def test_a_setting_that_is_not_read_is_refused_by_name_and_with_its_value(tmp_path: Path, key: str, value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        LoraConfig.load(_write(tmp_path, peft_type="LORA", r=4, **{key: value}))
    assert caught.value.exit_code == 3
    assert caught.value.details["tensor"] == key
    assert caught.value.details["found"] == json.dumps(value)
    assert CONFIG_NAME in caught.value.details["file"]


@pytest.mark.parametrize("value", [None, False, [], {}, ""])
def test_an_unknown_key_that_is_off_is_no_obstacle(tmp_path: Path, value: Any) -> None:
    assert LoraConfig.load(_write(tmp_path, r=4, a_key_of_tomorrow=value)).r == 4


@pytest.mark.parametrize(
    "values",
    [
        {"r": 0},
        {"r": "four"},
        {"lora_dropout": 1.0},
        {"lora_dropout": -0.1},
        {"bias": "some"},
        {"init_lora_weights": "loftq"},
        {"rank_pattern": {"q_proj": "many"}},
        {"rank_pattern": {"q_proj": 0}},
        {"rank_pattern": {"(q_proj": 2}},
        {"alpha_pattern": {"q_proj": -math.inf}},
        {"target_modules": "model.(q_proj"},
        {"exclude_modules": "model.(q_proj"},
        {"peft_type": "IA3"},
        {"lora_alpha": math.nan},
    ],
)
def test_a_value_of_the_wrong_kind_names_file_and_key(tmp_path: Path, values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        LoraConfig.load(_write(tmp_path, **values))
    assert caught.value.details["tensor"].startswith(next(iter(values)))
    assert CONFIG_NAME in caught.value.details["file"]


@pytest.mark.parametrize("text", ["", "{", "[]", '"text"', "\xff\xfe"])
def test_a_file_that_is_no_json_object_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / CONFIG_NAME).write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError) as caught:
        LoraConfig.load(tmp_path)
    assert CONFIG_NAME in caught.value.details["file"]


def test_a_missing_config_says_what_belongs_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"adapter_model\.safetensors"):
        LoraConfig.load(tmp_path)


def test_ranks_and_scalings_follow_the_patterns_at_the_end_of_a_name() -> None:
    config = LoraConfig(
        r=4, lora_alpha=10, rank_pattern={"q_proj": 2, r"layers\.1\..*": 8}, alpha_pattern={"layers.0.q_proj": 3}
    )
    assert config.rank("model.layers.0.q_proj") == 2
    assert config.rank("model.layers.1.k_proj") == 8
    assert config.rank("model.layers.1.v_proj") == 8
    assert config.rank("model.layers.0.xq_proj") == 4  # a pattern begins at a dot
    assert config.scaling("model.layers.0.q_proj") == 3 / 2
    assert config.scaling("model.layers.0.v_proj") == 10 / 4


def test_rslora_divides_by_the_root_of_the_rank_of_the_module() -> None:
    config = LoraConfig(r=4, lora_alpha=10, use_rslora=True, rank_pattern={"q_proj": 9})
    assert config.scaling("a.v_proj") == 10 / 2
    assert config.scaling("a.q_proj") == 10 / 3


def test_overlapping_patterns_mean_the_same_before_and_after_saving() -> None:
    config = LoraConfig(rank_pattern={"q_proj": 2, r"a\..*": 3}, alpha_pattern={"q_proj": 5, r"a\..*": 7})
    saved = LoraConfig(**json.loads(config.to_json()))
    assert (saved.rank("a.q_proj"), saved.scaling("a.q_proj")) == (config.rank("a.q_proj"), config.scaling("a.q_proj"))
