"""PEFT saves, we read and write, PEFT reads: the same tensors, the same configuration, the same outputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaForSequenceClassification

from lora_deploy.adapter import load_adapter, read_adapter, save_adapter, write_adapter
from tests.conftest import QUIET_PEFT, tiny_model, token_ids
from tests.peft.models import move

pytestmark = [
    *QUIET_PEFT,
    pytest.mark.filterwarnings("ignore:`init_lora_weights` is 'eva' but:UserWarning"),
    pytest.mark.filterwarnings("ignore:lora with eva initialization used with:UserWarning"),
]

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
QV = ["q_proj", "v_proj"]
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {"target_modules": QV}),
    "all-linear": ("llama", {"target_modules": "all-linear"}),
    "whole numbers": ("llama", {"target_modules": QV, "lora_alpha": 16, "alpha_pattern": {"q_proj": 3}}),
    "broken numbers": ("llama", {"target_modules": QV, "lora_alpha": 2.5, "alpha_pattern": {"q_proj": 3.0}}),
    "DoRA": ("llama", {"target_modules": QV, "use_dora": True}),
    "a bias of B": ("llama", {"target_modules": QV, "lora_bias": True}),
    "bias all": ("qwen2", {"target_modules": QV, "bias": "all"}),
    "bias lora_only": ("qwen2", {"target_modules": QV, "bias": "lora_only"}),
    "saved, out of order": ("llama", {"target_modules": QV, "modules_to_save": ["norm", "lm_head"]}),
    "patterns": (
        "llama",
        {"target_modules": QV, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"^model.*v_proj": 5}},
    ),
    "rslora": ("llama", {"target_modules": QV, "use_rslora": True, "lora_dropout": 0.1}),
    "layers": ("llama", {"target_modules": QV, "layers_to_transform": 1, "layers_pattern": "layers"}),
    "excluded": (
        "llama",
        {"target_modules": QV, "exclude_modules": ["0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"]},
    ),
    "a regex": ("llama", {"target_modules": r".*(q|v)_proj", "exclude_modules": r".*\.0\..*q_proj"}),
    "an adapted head": ("llama", {"target_modules": ["q_proj", "lm_head"]}),
    "DoRA and a saved norm": ("llama", {"target_modules": QV, "use_dora": True, "modules_to_save": ["norm"]}),
    "Conv1D": ("gpt2", {"target_modules": ["c_attn"]}),
    "a classifier": ("classifier", {"target_modules": QV, "task_type": "SEQ_CLS"}),
    "no task": ("llama", {"target_modules": QV, "task_type": None}),
    "gaussian": ("llama", {"target_modules": QV, "init_lora_weights": "gaussian", "revision": "v2"}),
    "eva": ("llama", {"target_modules": QV, "init_lora_weights": "eva"}),
}


def _base(family: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    if family != "classifier":
        return tiny_model(family).to(dtype)
    config = tiny_model("llama").config
    config.num_labels = 3
    torch.manual_seed(4)
    return LlamaForSequenceClassification(config).eval().to(dtype)


def _saved(case: str, directory: Path) -> nn.Module:
    family, config = CASES[case]
    settings = {"r": 4, "lora_alpha": 10, "task_type": "CAUSAL_LM"} | config
    theirs = move(peft.get_peft_model(_base(family), peft.LoraConfig(**settings)), 0.2).eval()
    theirs.save_pretrained(directory)
    return theirs


@torch.no_grad()
def _outputs(adapted: nn.Module) -> torch.Tensor:
    return adapted(input_ids=token_ids()).logits.float()


def _assert_same_configuration(found: Path, expected: Path) -> None:
    ours, theirs = (json.loads((directory / CONFIG).read_text()) for directory in (found, expected))
    for values in (ours, theirs):  # Sets, which PEFT writes in any order.
        for field in ("target_modules", "exclude_modules"):
            values[field] = sorted(values[field]) if isinstance(values[field], list) else values[field]
    assert json.dumps(ours, sort_keys=True) == json.dumps(theirs, sort_keys=True)  # 16 is not 16.0 there


def _assert_same_tensors(found: Path, expected: Path, but: str | None = None) -> None:
    ours, theirs = (load_file(directory / WEIGHTS) for directory in (found, expected))
    theirs = {name: values for name, values in theirs.items() if name != but}
    assert ours.keys() == theirs.keys()
    for name, values in theirs.items():
        assert ours[name].dtype == values.dtype
        assert torch.equal(ours[name].view(torch.uint8), values.view(torch.uint8))


@pytest.mark.parametrize("case", CASES)
def test_what_peft_saved_goes_back_to_peft_unchanged(case: str, tmp_path: Path) -> None:
    theirs = _saved(case, tmp_path / "theirs")
    write_adapter(read_adapter(tmp_path / "theirs"), tmp_path / "files")
    save_adapter(load_adapter(_base(CASES[case][0]), tmp_path / "theirs"), tmp_path / "model")
    _assert_same_tensors(tmp_path / "files", tmp_path / "theirs")
    # The base's own weight of an adapted head is no part of what a model has learnt.
    _assert_same_tensors(tmp_path / "model", tmp_path / "theirs", "base_model.model.lm_head.base_layer.weight")
    for way in ("files", "model"):
        _assert_same_configuration(tmp_path / way, tmp_path / "theirs")
        back = peft.PeftModel.from_pretrained(_base(CASES[case][0]), tmp_path / way).eval()
        assert torch.equal(_outputs(back), _outputs(theirs))
    assert (_outputs(theirs) - _outputs(_base(CASES[case][0]))).abs().max() > 0.05


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tensors_keep_their_type(dtype: torch.dtype, tmp_path: Path) -> None:
    config = peft.LoraConfig(
        r=4, lora_alpha=10, target_modules=QV, modules_to_save=["norm"], use_dora=True, task_type="CAUSAL_LM"
    )
    theirs = peft.get_peft_model(_base("llama", dtype), config, autocast_adapter_dtype=False)
    move(theirs).save_pretrained(tmp_path / "theirs")
    assert {values.dtype for values in load_file(tmp_path / "theirs" / WEIGHTS).values()} == {dtype}
    write_adapter(read_adapter(tmp_path / "theirs"), tmp_path / "ours")
    _assert_same_tensors(tmp_path / "ours", tmp_path / "theirs")
    _assert_same_configuration(tmp_path / "ours", tmp_path / "theirs")
