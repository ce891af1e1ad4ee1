"""What can be asked for, and what each layer gets."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from lora_deploy.errors import UsageError
from lora_deploy.quantization.base import TrainingBase
from lora_deploy.requantize import Requantization, parse_keep
from lora_deploy.requantize.options import bits_per_weight, mean_bits
from tests.conftest import CheckpointFactory


def test_keep_is_read() -> None:
    assert parse_keep(["int8:down_proj,layers.0", "float:v_proj"]) == (
        ("down_proj", 8),
        ("layers.0", 8),
        ("v_proj", None),
    )


@pytest.mark.parametrize("text", ["down_proj", "int9:down_proj", "int8:", "int8:a,,b", ":a"])
def test_keep_that_says_nothing_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="which layers to keep"):
        parse_keep([text])


@pytest.mark.parametrize(
    "options",
    [
        {"blocksize": 24},
        {"correction": -1},
        {"rows": -1},
        {"correction": 4, "rows": 0},
        {"budget_bits": 5.0, "rows": 0},
        {"budget_bits": 4.2},
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        Requantization(4, **options)


def test_eight_bits_leave_no_budget() -> None:
    with pytest.raises(UsageError, match="no choice"):
        Requantization(8, budget_bits=9.0)


def test_grids_follow_keep_and_the_last_word_counts(checkpoint_dir: CheckpointFactory) -> None:
    base = TrainingBase(checkpoint_dir("llama"))
    asked = Requantization(4, keep=parse_keep(["int8:mlp", "float:layers.0", "int8:layers.0.mlp.up_proj"]), head=None)
    grids = asked.grids(base)
    assert grids["model.layers.1.mlp.down_proj"] == (8, 32)
    assert grids["model.layers.1.self_attn.q_proj"] == (4, 32)
    assert grids["model.layers.0.mlp.up_proj"] == (8, 32)
    assert "model.layers.0.mlp.down_proj" not in grids
    assert "model.layers.0.self_attn.q_proj" not in grids
    assert not any("lm_head" in name or "embed" in name for name in grids)


def test_a_part_that_is_in_no_name_is_refused(checkpoint_dir: CheckpointFactory) -> None:
    base = TrainingBase(checkpoint_dir("llama"))
    with pytest.raises(UsageError, match="in its name"):
        Requantization(4, keep=(("down", 8),)).grids(base)


def test_the_head_and_the_embedding_are_one_where_they_are_tied(checkpoint_dir: CheckpointFactory) -> None:
    tied = TrainingBase(checkpoint_dir("llama", tie_word_embeddings=True))
    apart = TrainingBase(checkpoint_dir("llama", tie_word_embeddings=False))
    assert Requantization(4, head=8).grids(tied).keys() - tied.linears.keys() == {"model.embed_tokens"}
    assert Requantization(4, head=4).grids(apart).keys() - apart.linears.keys() == {"model.embed_tokens", "lm_head"}


def test_bits() -> None:
    assert bits_per_weight((4, 32)) == 4.5
    assert bits_per_weight((8, 128)) == 8.125


def test_mean_bits_count_the_correction(checkpoint_dir: CheckpointFactory) -> None:
    base = TrainingBase(checkpoint_dir("llama"))
    grids = Requantization(4, head=None).grids(base)
    assert mean_bits(grids, base) == 4.5
    shapes = [base.linears[name].shape for name in grids]
    expected = 4.5 + 8.5 * 3 * sum(map(sum, shapes)) / sum(rows * columns for rows, columns in shapes)
    assert mean_bits(grids, base, correction=3) == pytest.approx(expected)


def test_exports_need_nothing_of_the_extra_for_training() -> None:
    code = (
        "import sys; sys.modules['accelerate'] = None; import lora_deploy.export.export, lora_deploy.verify.deployment"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
