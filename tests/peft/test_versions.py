"""`adapter_config.json` of older versions of PEFT, with the fields and defaults that each of them wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_deploy.adapter import load_adapter, read_adapter
from lora_deploy.config import LoraConfig
from lora_deploy.errors import ConfigError
from tests.peft.models import inputs, model, trained_by_peft

# What LoraConfig(r=4, lora_alpha=10, target_modules=["lin0"]) wrote in each version.
OLDEST = {
    "base_model_name_or_path": "base",
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
    "lora_alpha": 10,
    "lora_dropout": 0.0,
    "modules_to_save": None,
    "peft_type": "LORA",
    "r": 4,
    "target_modules": ["lin0"],
    "task_type": "CAUSAL_LM",
}
V2 = OLDEST | {"enable_lora": None, "merge_weights": False}
V3 = OLDEST | {"init_lora_weights": True}
V5 = V3 | {"auto_mapping": None, "layers_pattern": None, "layers_to_transform": None, "revision": None}
V7 = V5 | {
    "alpha_pattern": {},
    "loftq_config": {},
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "rank_pattern": {},
}
V10 = V7 | {"layer_replication": None, "use_dora": False, "use_rslora": False}
V13 = V10
V17 = V13 | {
    "corda_config": None,
    "eva_config": None,
    "exclude_modules": None,
    "lora_bias": False,
    "qalora_group_size": 16,
    "target_parameters": None,
    "trainable_token_indices": None,
    "use_qalora": False,
}
VERSIONS = {"0.2": V2, "0.3": V3, "0.5": V5, "0.7": V7, "0.10": V10, "0.13": V13, "0.17": V17}


@pytest.mark.parametrize("version", VERSIONS)
def test_configurations_of_older_versions_are_read(version: str, tmp_path: Path) -> None:
    theirs = trained_by_peft("MLP", {"target_modules": ["lin0"]}, tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(VERSIONS[version]))
    ours = load_adapter(model("MLP"), tmp_path)
    torch.testing.assert_close(ours(inputs()), theirs(inputs()))
    written = json.loads(LoraConfig.load(tmp_path).to_json())
    kept = {key: value for key, value in VERSIONS[version].items() if key != "merge_weights"}
    assert written.items() >= kept.items()


@pytest.mark.parametrize(
    ("version", "key", "value"),
    [
        ("0.2", "enable_lora", [True, False, True]),
        ("0.10", "layer_replication", [[0, 2]]),
        ("0.7", "megatron_config", {"hidden_size": 8}),
        ("0.17", "use_qalora", True),
        ("0.17", "target_parameters", ["lin0.weight"]),
    ],
)
def test_a_setting_of_an_older_version_that_changes_the_maths_is_refused(
    version: str, key: str, value: Any, tmp_path: Path
) -> None:
    trained_by_peft("MLP", {"target_modules": ["lin0"]}, tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(VERSIONS[version] | {key: value}))
    with pytest.raises(ConfigError) as caught:
        read_adapter(tmp_path)
    assert caught.value.details["tensor"] == key


def test_merge_weights_of_an_older_version_is_followed(tmp_path: Path) -> None:
    theirs = trained_by_peft("MLP", {"target_modules": ["lin0"]}, tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(V2 | {"merge_weights": True}))
    ours = load_adapter(model("MLP"), tmp_path)
    assert not ours.train().lin0.merged
    assert ours.eval().lin0.merged
    torch.testing.assert_close(ours(inputs()), theirs(inputs()))
