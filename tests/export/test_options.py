"""What an export can be asked for: every contradiction is an error of usage that says what goes together."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lora_deploy.adapter import TrainingRecord, write_adapter
from lora_deploy.errors import AdapterError, LoraDeployError, UsageError
from lora_deploy.export.plan import plan_export
from lora_deploy.quantization import QuantizationScheme
from lora_deploy.quantization.base import TrainingBase
from tests.conftest import CheckpointFactory, random_adapter, tiny_model

AdapterFactory = Callable[..., Path]


@pytest.mark.parametrize(
    ("options", "message", "named"),
    [
        ({"provider": "tpu"}, "no such provider", "cpu, cuda, webgpu or dml"),
        ({"branch": "grafted"}, "no such branch", "fixed, hot-swap, pooled"),
        ({"branch": None, "precision": "nf4"}, "needs --branch", "fp32, fp16, bf16"),
        ({"branch": None, "precision": "fp4"}, "needs --branch", "int8, int4"),
        ({"branch": None, "precision": "fp64"}, "no such precision", "fp32, fp16, bf16"),
        ({"precision": "int4"}, "needs --merge", "nf4"),
        ({"precision": "bf16"}, "does not compute in bf16", "cuda"),
        ({"compute_dtype": "bf16"}, "does not compute in bf16", "cuda"),
        ({"compute_dtype": "fp64"}, "no such type to compute in", "fp32, fp16, bf16"),
        ({"precision": "fp32", "compute_dtype": "fp16"}, "the type of its float weights", "--precision fp32"),
        ({"precision": "fp16", "compute_dtype": "fp32"}, "the type of its float weights", "--precision fp16"),
        ({"precision": "int8", "quantization": "none"}, "not trained in this precision", "fp32, fp16, bf16"),
        ({"precision": "nf4", "quantization": "none"}, "not trained in this precision", "a base in none"),
        ({"precision": "nf4", "quantization": "int8"}, "not trained in this precision", "int8, fp32, fp16, bf16"),
        ({"precision": "fp4", "quantization": "nf4"}, "not trained in this precision", "nf4, int8, fp32"),
        ({"precision": "fp32", "expand": True}, "only the base's own codes", "--precision fp32 --expand"),
        ({"precision": "int8", "expand": True}, "only the base's own codes", "a base in nf4"),
        ({"quantization": "none", "expand": True}, "only the base's own codes", "a base in none"),
        ({"quantization": "nf5"}, "no such quantization", "nf5"),
    ],
)
def test_a_contradiction_is_an_error_of_usage(
    options: dict[str, Any],
    message: str,
    named: str,
    checkpoint_dir: CheckpointFactory,
    adapter_dir: AdapterFactory,
    tmp_path: Path,
) -> None:
    values = {"branch": "hot-swap", "quantization": "nf4"} | options
    with pytest.raises(UsageError, match=message) as caught:
        plan_export(checkpoint_dir("llama"), {"one": adapter_dir("llama")}, tmp_path / "out", **values)
    assert named in str(caught.value)
    assert caught.value.exit_code == 2
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("branch", "asked", "message", "named"),
    [
        (None, "int8", "only an adapter that is a branch of its own", "--merge"),
        ("pooled", "int8", "only an adapter that is a branch of its own", "--pool"),
        ("fixed", "int4", "no such precision of adapters", "int8"),
        ("hot-swap", "fp16", "no such precision of adapters", "--adapter-precision"),
    ],
)
def test_int8_adapters_are_refused_before_anything_is_looked_at(
    branch: str | None, asked: str, message: str, named: str, tmp_path: Path
) -> None:
    """Neither the model nor the adapter is there."""
    with pytest.raises(UsageError, match=message) as caught:
        plan_export("none", {"one": "none"}, tmp_path / "out", branch=branch, adapter_precision=asked)
    assert named in str(caught.value)


@pytest.mark.parametrize(
    ("branch", "count", "message", "remedy"),
    [
        (None, 2, "only one adapter can be merged", "--branch"),
        ("fixed", 2, "a fixed branch is of one adapter", "give one --adapter"),
        ("fixed", 0, "a fixed branch is of one adapter", "give one --adapter"),
        ("pooled", 0, "a pool needs adapters", "NAME=DIR"),
    ],
)
def test_each_branch_takes_as_many_adapters_as_it_can_hold(
    branch: str | None,
    count: int,
    message: str,
    remedy: str,
    checkpoint_dir: CheckpointFactory,
    adapter_dir: AdapterFactory,
    tmp_path: Path,
) -> None:
    named = {f"adapter{number}": adapter_dir("llama") for number in range(count)}
    with pytest.raises(UsageError, match=message) as caught:
        plan_export(checkpoint_dir("llama"), named, tmp_path / "out", branch=branch, quantization="nf4")
    assert remedy in caught.value.details["remedy"]


@pytest.mark.parametrize("name", ["", ".", "..", ".hidden", "-x", "a/b", "a b", "../a", "a\n", "ä", "a=b"])
@pytest.mark.parametrize("branch", ["hot-swap", "pooled"])
def test_a_name_that_cannot_be_a_file_is_refused(
    branch: str, name: str, checkpoint_dir: CheckpointFactory, adapter_dir: AdapterFactory, tmp_path: Path
) -> None:
    named = {name: adapter_dir("llama")}
    with pytest.raises(UsageError, match="cannot be the name of an adapter"):
        plan_export(checkpoint_dir("llama"), named, tmp_path / "out", branch=branch, quantization="nf4")


@pytest.mark.parametrize("name", ["a", "v1.2", "my_adapter-7", "_x", "0"])
def test_usual_names_are_taken(
    name: str, checkpoint_dir: CheckpointFactory, adapter_dir: AdapterFactory, tmp_path: Path
) -> None:
    named = {name: adapter_dir("llama")}
    plan = plan_export(checkpoint_dir("llama"), named, tmp_path / "out", branch="hot-swap", quantization="nf4")
    assert list(plan.adapters) == [name]


@pytest.mark.parametrize(
    ("quantization", "options", "expected"),
    [
        ("nf4", {}, ("nf4", "fp32")),
        ("fp4", {}, ("fp4", "fp32")),
        ("int8", {}, ("int8", "fp32")),
        ("none", {}, ("fp32", "fp32")),
        ("none", {"compute_dtype": "fp16"}, ("fp16", "fp16")),
        ("nf4", {"compute_dtype": "fp16"}, ("nf4", "fp16")),
        ("nf4", {"precision": "fp16"}, ("fp16", "fp16")),
        ("nf4", {"precision": "int8"}, ("int8", "fp32")),
        ("nf4", {"precision": "fp16", "compute_dtype": "fp16"}, ("fp16", "fp16")),
        ("nf4", {"provider": "cuda"}, ("nf4", "fp16")),
        ("nf4", {"provider": "cuda", "compute_dtype": "bf16"}, ("nf4", "bf16")),
        ("none", {"provider": "cuda"}, ("fp16", "fp16")),
        ("none", {"provider": "cuda", "precision": "bf16"}, ("bf16", "bf16")),
    ],
)
def test_what_is_not_asked_for_is_what_the_base_was_in_training(
    quantization: str,
    options: dict[str, Any],
    expected: tuple[str, str],
    checkpoint_dir: CheckpointFactory,
    tmp_path: Path,
) -> None:
    values = {"branch": "hot-swap", "quantization": quantization} | options
    plan = plan_export(checkpoint_dir("llama"), None, tmp_path / "out", **values)
    assert (plan.precision, plan.compute_dtype) == expected


def _recorded(base: Path, directory: Path, scheme: QuantizationScheme) -> Path:
    write_adapter(random_adapter(tiny_model("llama")), directory)
    sha256 = TrainingBase(base).sha256()
    TrainingRecord(base_model="b", quantization=scheme, base_sha256=sha256).save(directory)
    return directory


@pytest.mark.parametrize(
    "other",
    [
        QuantizationScheme(method="fp4"),
        QuantizationScheme(method="nf4", double_quant=False),
        QuantizationScheme(method="nf4", skip_modules=("k_proj",)),
    ],
    ids=str,
)
def test_adapters_that_were_trained_on_different_quantizations_are_exported_apart(
    other: QuantizationScheme, checkpoint_dir: CheckpointFactory, tmp_path: Path
) -> None:
    base = checkpoint_dir("llama")
    scheme = QuantizationScheme(method="nf4")
    named = {"one": _recorded(base, tmp_path / "1", scheme), "two": _recorded(base, tmp_path / "2", other)}
    with pytest.raises(AdapterError, match="different quantizations") as caught:
        plan_export(base, named, tmp_path / "out", branch="hot-swap")
    assert caught.value.details["tensor"] == "two"
    assert "as one" in caught.value.details["expected"]
    assert caught.value.exit_code == 3
    same = plan_export(base, {"one": named["one"], "again": named["one"]}, tmp_path / "out", branch="pooled")
    assert same.base.scheme == scheme


@pytest.mark.parametrize("options", [{"quantization": "fp4"}, {"quantization": "nf4", "double_quant": False}])
def test_the_record_of_the_training_is_not_contradicted(
    options: dict[str, Any], checkpoint_dir: CheckpointFactory, tmp_path: Path
) -> None:
    base = checkpoint_dir("llama")
    adapter = _recorded(base, tmp_path / "adapter", QuantizationScheme(method="nf4"))
    with pytest.raises(LoraDeployError, match="another quantization than the one asked for"):
        plan_export(base, {"one": adapter}, tmp_path / "out", branch="hot-swap", **options)
