"""Every field of the installed PEFT's LoraConfig is supported, carried or refused; a new one fails here."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

from lora_deploy.adapter import load_adapter, read_adapter
from lora_deploy.config import LoraConfig
from lora_deploy.errors import ConfigError
from lora_deploy.layers import get_lora_config
from tests.adapted_tables import QUIET, TIED, peft_model
from tests.conftest import logits, tiny_model
from tests.peft.models import copied, inputs, model, move, theirs_and_ours, trained_by_peft

pytestmark = QUIET

# Of each field: what is common, and the field's value; without it PEFT computes something else.
_LIN: dict[str, Any] = {"target_modules": ["lin", "up"]}
SUPPORTED: dict[str, tuple[dict[str, Any], Any]] = {
    "r": (_LIN, 3),
    "lora_alpha": (_LIN, 3),
    "lora_dropout": (_LIN, 0.5),
    "target_modules": ({"target_modules": ["up"]}, ["my_lin"]),
    "exclude_modules": (_LIN, ["0.lin"]),
    "layers_to_transform": (_LIN, [1]),
    "layers_pattern": ({"target_modules": ["up"], "layers_to_transform": [1]}, "experts"),
    "bias": (_LIN, "all"),
    "modules_to_save": (_LIN, ["head"]),
    "use_rslora": (_LIN, True),
    "rank_pattern": (_LIN, {"up": 2}),
    "alpha_pattern": (_LIN, {"up": 2}),
    "use_dora": (_LIN, True),
    "lora_bias": (_LIN, True),
    "init_lora_weights": (_LIN, False),
}
# Of a decoder whose embedding and output head are one weight.
OF_TABLES: dict[str, tuple[dict[str, Any], Any]] = {
    "trainable_token_indices": ({"target_modules": ["q_proj"]}, [130, 5, 77]),
    "ensure_weight_tying": ({"target_modules": ["q_proj", "embed_tokens"]}, True),
}
CARRIED: dict[str, Any] = {
    # What the adapter is of.
    "task_type": "FEATURE_EXTRACTION",
    "auto_mapping": {"base_model_class": "Wrapped", "parent_library": "here"},
    "base_model_name_or_path": "someone/base",
    "revision": "v2",
    "peft_version": "0.99.0",
    "inference_mode": False,
    # Set from the type of each layer.
    "fan_in_fan_out": True,
    # Nothing without megatron_config and use_qalora.
    "megatron_core": "another.core",
    "qalora_group_size": 32,
    # How A and B began; where that changed the base, init_lora_weights is refused.
    "loftq_config": {"loftq_bits": 4},
    "eva_config": {"rho": 2.0},
    "corda_config": {"corda_method": "ipm"},
    "lora_ga_config": {"direction": "ArBr"},
}
REFUSED: dict[str, Any] = {
    "peft_type": "IA3",
    "megatron_config": {"hidden_size": 8},
    "velora_config": {"num_groups": 4},
    "alora_invocation_tokens": [1, 2],
    "use_qalora": True,
    "monteclora_config": {"num_samples": 8},
    "layer_replication": [[0, 2]],
    "target_parameters": ["lin.weight"],
    "use_bdlora": {"nblocks": 2},
    "arrow_config": {"top_k": 2},
    "kasa_config": {"beta": 0.1},
}
# Of the running process; PEFT does not save it.
NEVER_SAVED = {"runtime_config"}


def test_every_field_of_peft_is_decided_once() -> None:
    fields = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    decided = [*SUPPORTED, *OF_TABLES, *CARRIED, *REFUSED, *NEVER_SAVED]
    assert len(decided) == len(set(decided))
    assert set(decided) == fields
    assert peft.LoraConfig().to_dict().keys() == fields - NEVER_SAVED
    assert LoraConfig.model_fields.keys() - {"merge_weights"} <= SUPPORTED.keys() | OF_TABLES.keys() | CARRIED.keys()


def _outputs(adapted: nn.Module) -> torch.Tensor:
    torch.manual_seed(1)  # of the dropout
    return adapted(inputs())


@pytest.mark.parametrize("field", [field for field in SUPPORTED if field != "init_lora_weights"])
def test_a_supported_field_changes_what_peft_computes_and_is_followed(field: str, tmp_path: Path) -> None:
    common, value = SUPPORTED[field]
    theirs, ours = theirs_and_ours("Wrapped", common | {field: value})
    move(theirs)
    copied(theirs, ours)
    expected = _outputs(theirs)
    torch.testing.assert_close(_outputs(ours), expected)
    theirs.save_pretrained(tmp_path)
    read = load_adapter(model("Wrapped"), tmp_path).train()
    torch.testing.assert_close(_outputs(read), expected)
    without = move(theirs_and_ours("Wrapped", common)[0])
    assert (_outputs(without) - expected).abs().max() > 0.01


@pytest.mark.parametrize("field", OF_TABLES)
def test_a_field_of_tables_changes_what_peft_computes_and_is_followed(field: str, tmp_path: Path) -> None:
    common, value = OF_TABLES[field]
    theirs = peft_model(tiny_model("llama", **TIED), common | {field: value})
    theirs.save_pretrained(tmp_path)
    expected = logits(theirs)
    ours = load_adapter(tiny_model("llama", **TIED), tmp_path).eval()
    torch.testing.assert_close(logits(ours), expected, rtol=1e-4, atol=1e-4)
    _edit(tmp_path, field, None)
    without = peft.PeftModel.from_pretrained(tiny_model("llama", **TIED), tmp_path).eval()
    assert (logits(without) - expected).abs().max() > 0.01


def test_the_initialization_is_followed() -> None:
    common, value = SUPPORTED["init_lora_weights"]
    base = model("Wrapped")(inputs())
    for adapted in theirs_and_ours("Wrapped", common | {"init_lora_weights": value}):
        assert (adapted(inputs()) - base).abs().max() > 0.01
    for adapted in theirs_and_ours("Wrapped", common):
        torch.testing.assert_close(adapted(inputs()), base)


@pytest.mark.parametrize("field", CARRIED)
def test_a_carried_field_changes_nothing_and_is_kept(field: str, tmp_path: Path) -> None:
    theirs = trained_by_peft("Wrapped", _LIN, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())[field] != CARRIED[field]
    _edit(tmp_path, field, CARRIED[field])
    ours = load_adapter(model("Wrapped"), tmp_path)
    torch.testing.assert_close(ours(inputs()), theirs(inputs()))
    assert json.loads(get_lora_config(ours).to_json())[field] == CARRIED[field]


@pytest.mark.parametrize("field", REFUSED)
def test_a_refused_field_is_named_and_is_no_obstacle_at_its_default(field: str, tmp_path: Path) -> None:
    trained_by_peft("Wrapped", _LIN, tmp_path)
    assert field in json.loads((tmp_path / "adapter_config.json").read_text())
    read_adapter(tmp_path)
    _edit(tmp_path, field, REFUSED[field])
    with pytest.raises(ConfigError) as caught:
        read_adapter(tmp_path)
    assert caught.value.details["tensor"] == field
    assert caught.value.exit_code == 3


def _edit(directory: Path, field: str, value: Any) -> None:
    file = directory / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {field: value}))
