"""The choice of modules: the same configuration adapts the same set here and in PEFT.

After PEFT's tests/test_tuners_utils.py: `REGEX_TEST_CASES`, `MAYBE_INCLUDE_ALL_LINEAR_LAYERS_TEST_CASES`,
`TestTargetedModuleNames` (with its experts), `TestExcludedModuleNames`; ranks and alphas by pattern after
tests/test_initialization.py, `test_rank_alpha_pattern_override` and `test_lora_default_scaling_pattern`.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

from lora_deploy.adapter import load_adapter, save_adapter
from lora_deploy.config import LoraConfig
from lora_deploy.errors import ConfigError
from lora_deploy.layers import get_lora_config, get_lora_model, lora_layers
from lora_deploy.layers.model import find_targets
from tests.conftest import tiny_model
from tests.peft.models import PREFIX, inputs, model, move

pytestmark = [
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning"),
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning"),
]

# Of Wrapped: model.layers.{0,1,2}.{lin,my_lin,experts.{0,1}.up} and head.
CASES: dict[str, dict[str, Any]] = {
    "a last part": {"target_modules": ["lin"]},
    "two last parts": {"target_modules": ["lin", "up"]},
    "a whole name": {"target_modules": ["model.layers.0.lin"]},
    "the last two parts": {"target_modules": ["1.lin"]},
    "a name in the root": {"target_modules": ["head"]},
    "a string is no list": {"target_modules": "head"},
    "the whole name must match": {"target_modules": r".*\.lin"},
    "a beginning": {"target_modules": r"model\.layers\.0.*(lin|up)"},
    "an alternative": {"target_modules": r".*(0|2)\.(my_lin|lin)"},
    "anchors": {"target_modules": r"^model\.layers\.\d\.lin$"},
    "a look-behind": {"target_modules": r".*(?<!my_)lin"},
    "all-linear": {"target_modules": "all-linear"},
    "all-linear in capitals": {"target_modules": "ALL-Linear"},
    "excluded by last part": {"target_modules": "all-linear", "exclude_modules": ["lin"]},
    "excluded by whole name": {"target_modules": ["lin"], "exclude_modules": ["model.layers.2.lin"]},
    "excluded by regex": {"target_modules": ["lin", "up"], "exclude_modules": r".*experts.*"},
    "an exclusion of nothing": {"target_modules": ["lin"], "exclude_modules": []},
    "excluded modules may be of any kind": {
        "target_modules": r"model\.layers\.0\..*",
        "exclude_modules": r".*(act|experts|experts\.\d)",
    },
    "a module that is saved": {"target_modules": r".*(my_lin|head)", "modules_to_save": ["head"]},
    "one layer": {"target_modules": ["lin"], "layers_to_transform": 1},
    "the first layer": {"target_modules": ["lin"], "layers_to_transform": [0]},
    "two layers": {"target_modules": ["lin", "my_lin"], "layers_to_transform": [2, 0]},
    "no choice of layers": {"target_modules": ["lin"], "layers_to_transform": []},
    "layers by the name of their list": {
        "target_modules": ["lin"],
        "layers_to_transform": [1],
        "layers_pattern": "layers",
    },
    "layers by names": {"target_modules": ["lin"], "layers_to_transform": [1], "layers_pattern": ["h", "layers"]},
    "an empty name of the list": {"target_modules": ["lin"], "layers_to_transform": [1], "layers_pattern": ""},
    "no names of the list": {"target_modules": ["lin"], "layers_to_transform": [1], "layers_pattern": []},
    "the layer, not the expert": {"target_modules": ["up"], "layers_to_transform": [2]},
    "the expert by name": {"target_modules": ["up"], "layers_to_transform": [1], "layers_pattern": ["experts"]},
    "the first name that is there": {
        "target_modules": ["up"],
        "layers_to_transform": [1],
        "layers_pattern": ["experts", "layers"],
    },
    "a name as a regex": {"target_modules": ["up"], "layers_to_transform": [1], "layers_pattern": r"lay\w*"},
    "layers and an exclusion": {"target_modules": ["lin"], "layers_to_transform": [0, 1], "exclude_modules": ["0.lin"]},
}
# Of Deep, whose list lies in the root: PEFT finds no layer there unless it is told the name, and takes the expert's.
ROOT: dict[str, dict[str, Any]] = {
    "the list is named": {"target_modules": ["lin"], "layers_to_transform": [1], "layers_pattern": "layers"},
    "the list is not named": {"target_modules": ["up"], "layers_to_transform": [1]},
}


def _theirs(base: nn.Module, config: dict[str, Any]) -> dict[str, Any]:
    adapted = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**copy.deepcopy(config)))
    layers = {name: m for name, m in adapted.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    return {name.removeprefix(PREFIX): layer for name, layer in layers.items()}


@pytest.mark.parametrize("case", CASES)
def test_the_same_modules_as_in_peft(case: str) -> None:
    base = model("Wrapped")
    expected = _theirs(base, CASES[case]).keys()
    assert expected
    assert find_targets(base, LoraConfig(**CASES[case])).keys() == expected
    assert lora_layers(get_lora_model(base, LoraConfig(**CASES[case]))).keys() == expected


@pytest.mark.parametrize("case", ROOT)
def test_the_same_modules_as_in_peft_where_the_layers_are_in_the_root(case: str) -> None:
    base = model("Deep")
    assert find_targets(base, LoraConfig(**ROOT[case])).keys() == _theirs(base, ROOT[case]).keys()


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["in"]},
        {"target_modules": ["lin.weight"]},
        {"target_modules": "lin"},
        {"target_modules": r"layers\.0\.lin"},
        {"target_modules": []},
        {"target_modules": ["lin"], "exclude_modules": ["lin"]},
        {"target_modules": ["lin"], "layers_to_transform": [3]},
        {"target_modules": ["lin"], "layers_to_transform": [1], "layers_pattern": ["layer"]},
        {"target_modules": ["lin"], "layers_pattern": "layers"},
        {"target_modules": ["layers"]},
        {"target_modules": ["act"]},
    ],
    ids=str,
)
def test_what_adapts_nothing_is_an_error_in_both(config: dict[str, Any]) -> None:
    with pytest.raises((ValueError, KeyError)):
        _theirs(model("Wrapped"), config)
    with pytest.raises(ConfigError):
        get_lora_model(model("Wrapped"), LoraConfig(**config))


@pytest.mark.parametrize(
    "config",
    [{"target_modules": ["lin", "other"]}, {"target_modules": ["lin", "head"], "modules_to_save": ["head"]}],
    ids=["no module", "a module that is saved"],
)
def test_a_name_in_a_list_that_adapts_nothing_is_an_error_here_which_peft_overlooks(config: dict[str, Any]) -> None:
    assert _theirs(model("Wrapped"), config)
    with pytest.raises(ConfigError, match=config["target_modules"][1]):
        get_lora_model(model("Wrapped"), LoraConfig(**config))


@pytest.mark.parametrize("saved", ["lin", "model.layers.0.lin", "my_lin"])
def test_a_module_cannot_be_adapted_and_trained_whole_by_the_end_of_its_name(saved: str) -> None:
    """PEFT's `test_modules_to_save_targets_lora_layer_raises`."""
    config = {"target_modules": r".*lin", "modules_to_save": [saved]}
    if saved == "lin":  # "lin" keeps adapters off `lin`, and takes `my_lin` whole, which has one.
        with pytest.raises((ValueError, TypeError)):
            _theirs(model("Wrapped"), config)
        with pytest.raises(ConfigError, match="trained whole") as caught:
            get_lora_model(model("Wrapped"), LoraConfig(**config))
        assert "my_lin" in caught.value.details["tensor"]
    else:
        base = model("Wrapped")
        assert find_targets(base, LoraConfig(**config)).keys() == _theirs(base, config).keys()


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("targets", ["all-linear", r".*\.0\..*(attn|mlp)\.(c_proj|q_proj|down_proj)"])
def test_decoders_of_transformers(family: str, targets: str) -> None:
    base = tiny_model(family)
    config = {"target_modules": targets, "task_type": "CAUSAL_LM"}
    assert find_targets(base, LoraConfig(**config)).keys() == _theirs(base, config).keys()


PATTERNS: dict[str, dict[str, Any]] = {
    "a last part": {"rank_pattern": {"lin": 2}},
    "a whole name": {"rank_pattern": {"model.layers.0.lin": 2}},
    "an anchor": {"rank_pattern": {"^model.layers.0.lin": 2}, "alpha_pattern": {"^model.layers.1.lin": 5}},
    "an anchor that does not fit": {"rank_pattern": {"^layers.0.lin": 2}},
    "both anchors": {"rank_pattern": {r"^model\.layers\.0\.lin$": 2}},
    "an end that is no part": {"rank_pattern": {"in": 2}, "alpha_pattern": {"y_lin": 3}},
    "classes and groups": {"rank_pattern": {r"layers\.[01]\.(my_)?lin": 2}},
    "a count": {"rank_pattern": {r"experts\.\d{1}\.up": 1}, "alpha_pattern": {r"experts\.(?:0|1)\.up": 1}},
    "any": {"rank_pattern": {".*": 3}, "alpha_pattern": {r".*\.2\..*": 1}},
    "a look-ahead": {"rank_pattern": {r"(?!.*my_).*lin": 2}},
    "an alternative without a group": {"rank_pattern": {"up|head": 2}},
    "two patterns that overlap, sorted": {"rank_pattern": {"0.lin": 2, "lin": 3}, "alpha_pattern": {"0.lin": 5}},
    "rslora": {"rank_pattern": {"lin": 9}, "alpha_pattern": {"up": 7}, "use_rslora": True},
}


@pytest.mark.parametrize("case", PATTERNS)
def test_ranks_and_scalings_by_pattern(case: str) -> None:
    base = model("Wrapped")
    config = {"r": 4, "lora_alpha": 10, "target_modules": "all-linear"} | PATTERNS[case]
    theirs, ours = _theirs(base, config), lora_layers(get_lora_model(base, LoraConfig(**config)))
    for name, layer in theirs.items():
        assert (ours[name].r, ours[name].scaling) == (layer.r["default"], pytest.approx(layer.scaling["default"]))


def test_a_pattern_of_no_module_is_warned_about_as_in_peft(caplog: pytest.LogCaptureFixture) -> None:
    config = {"target_modules": ["lin"], "rank_pattern": {"lin": 2, "up": 2}, "alpha_pattern": {"in": 3}}
    with pytest.warns(RuntimeWarning, match="up"):
        _theirs(model("Wrapped"), config)
    get_lora_model(model("Wrapped"), LoraConfig(**config))
    assert [record.getMessage().partition(" is ")[0] for record in caplog.records] == [
        "rank_pattern: up",
        "alpha_pattern: in",
    ]


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": "all-linear", "layers_to_transform": [1]},
        {"target_modules": r".*lin", "layers_to_transform": 0, "layers_pattern": "layers"},
        {"target_modules": None, "layers_to_transform": []},
        {"target_modules": None},
    ],
    ids=str,
)
def test_a_choice_that_peft_cannot_read_is_saved_as_one_that_it_can(config: dict[str, Any], tmp_path: Path) -> None:
    """PEFT takes no layers beside a string, and has a table in the place of None."""
    ours = move(get_lora_model(model("Wrapped"), LoraConfig(**config, task_type=None)))
    save_adapter(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(model("Wrapped"), tmp_path)
    torch.testing.assert_close(theirs(inputs()), ours(inputs()))
    assert (ours(inputs()) - model("Wrapped")(inputs())).abs().max() > 0.05
    again = load_adapter(model("Wrapped"), tmp_path)
    assert lora_layers(again).keys() == lora_layers(ours).keys()
    assert get_lora_config(again).target_modules == get_lora_config(ours).target_modules
