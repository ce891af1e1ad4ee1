"""Kinds and choices are read off the modules of any family, and PEFT counts the same parameters."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from lora_deploy.errors import CheckpointError, UsageError
from lora_deploy.planning.choices import FAIR, find_choices, suggest_budget
from lora_deploy.planning.kinds import find_kinds
from lora_deploy.quantization.skeleton import make_skeleton
from tests.planning.families import ATTENTION, CONFIGS, MLP

BUDGET = 3_000
FAMILIES = sorted(CONFIGS)


def skeleton(family: str) -> PreTrainedModel:
    return make_skeleton(CONFIGS[family], "causal-lm")


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_and_mlp_are_told_apart_without_knowing_the_family(family: str) -> None:
    kinds = find_kinds(skeleton(family))
    parts = {part: {kind.name for kind in kinds if kind.part == part} for part in ("attention", "mlp", "outside")}
    assert parts["attention"] == ATTENTION[family]
    assert parts["mlp"] == MLP[family]
    assert parts["outside"] == ({"project_in", "project_out"} if family == "opt" else set())
    assert all(len(kind.shapes) == 3 for kind in kinds if kind.part != "outside")


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_counts_what_every_choice_says(family: str) -> None:
    for choice in find_choices(find_kinds(skeleton(family)), BUDGET):
        model = AutoModelForCausalLM.from_config(CONFIGS[family], dtype=torch.float32)
        targets = "all-linear" if choice.name == "all-linear" else choice.targets
        config = PeftConfig(r=choice.rank, target_modules=targets, fan_in_fan_out=family == "gpt2")
        trainable, _ = get_peft_model(model, config).get_nb_trainable_parameters()
        assert choice.parameters == trainable, choice.name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("budget", [1_500, 3_000, 9_999])
def test_no_other_whole_rank_is_nearer_to_the_budget(family: str, budget: int) -> None:
    choices = find_choices(find_kinds(skeleton(family)), budget)
    assert {"attention", "mlp", "all-linear"} <= {choice.name for choice in choices}
    for choice in choices:
        per_rank = choice.parameters // choice.rank
        highest = min(min(shape) for shape in choice.shapes.values())
        assert 1 <= choice.rank <= highest
        for other in range(1, highest + 1):
            assert abs(choice.parameters - budget) <= abs(other * per_rank - budget)
        assert choice.deviation == pytest.approx(choice.parameters / budget - 1)
        assert choice.fair == (abs(choice.deviation) <= FAIR)


def test_the_choices_are_those_of_the_paper_and_more() -> None:
    names = [choice.name for choice in find_choices(find_kinds(skeleton("llama")), BUDGET)]
    assert names[:4] == ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert len(names) == 4 + 6 + 3
    assert names[5] == "q_proj+v_proj"
    # two joined matrices: the only pair is the whole attention
    joined = [choice.name for choice in find_choices(find_kinds(skeleton("gpt2")), BUDGET)]
    assert joined == ["c_attn", "attn.c_proj", "attention", "mlp", "all-linear"]


def test_a_rank_is_never_higher_than_the_matrix() -> None:
    choices = {choice.name: choice for choice in find_choices(find_kinds(skeleton("llama")), 10_500)}
    assert choices["k_proj"].rank == 28  # (28, 60): two heads of 14
    assert not choices["k_proj"].fair
    assert choices["all-linear"].fair


@pytest.mark.parametrize(("budget", "named"), [(10, "(k_proj at rank 1)"), (10**7, "(mlp at rank 60)")])
def test_a_budget_that_nothing_can_spend_is_refused_with_one_that_can(budget: int, named: str) -> None:
    kinds = find_kinds(skeleton("llama"))
    with pytest.raises(UsageError, match="no choice spends the budget") as caught:
        find_choices(kinds, budget)
    assert named in caught.value.details["expected"]
    suggested = int(caught.value.details["remedy"].removeprefix("--budget "))
    assert any(choice.fair for choice in find_choices(kinds, suggested))


def test_the_suggested_budget_is_spent_more_evenly() -> None:
    kinds = find_kinds(skeleton("llama"))

    def worst(budget: int) -> float:
        return max(abs(choice.deviation) for choice in find_choices(kinds, budget))

    for budget in (1_500, 2_500, 4_000):
        better = suggest_budget(kinds, budget)
        assert worst(better) <= worst(budget)
        assert abs(better / budget - 1) <= 0.3


class _Mixer(nn.Module):
    """Blocks without attention."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"mix": nn.Linear(4, 6)}) for _ in range(2))


def test_a_model_without_attention_is_refused_by_what_it_has() -> None:
    with pytest.raises(CheckpointError, match="no attention can be recognised") as caught:
        find_kinds(_Mixer())
    assert caught.value.details["found"] == "_Mixer with mix"
    assert caught.value.exit_code == 3


class _Twice(nn.Module):
    """Experts: one kind has layers with a number after its block's, and a name that other modules share."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Linear(3, 5)
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {"attention": nn.ModuleDict({"w": nn.Linear(4, 6)}), "experts": nn.ModuleList([nn.Linear(6, 4)] * 1)}
            )
            for _ in range(2)
        )


def test_targets_mean_their_kind_and_no_other() -> None:
    kinds = {kind.name: kind for kind in find_kinds(_Twice())}
    assert kinds["attention.w"].targets == ("attention.w",)
    experts = kinds["layers.*.experts.*"]
    assert experts.targets == ("layers.0.experts.0", "layers.1.experts.0")
    assert experts.part == "mlp"
    assert kinds["w"].part == "outside"
