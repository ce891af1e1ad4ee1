"""The plan: it exists only if everything fits, and making it writes nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from lora_deploy.adapter import TrainingRecord
from lora_deploy.errors import AdapterError, CheckpointError, OutputError, UsageError
from lora_deploy.export.plan import plan_export
from lora_deploy.quantization import QuantizationScheme
from lora_deploy.quantization.base import TrainingBase
from tests.commands import tree
from tests.conftest import TINY_FAMILIES, CheckpointFactory, random_adapter, tiny_model
from tests.export.conftest import ExportFactory

AdapterFactory = Callable[..., Path]


def _recorded(base: Path, directory: Path, scheme: QuantizationScheme) -> Path:
    """A saved adapter with the record that training leaves."""
    from lora_deploy.adapter import write_adapter

    write_adapter(random_adapter(tiny_model("llama")), directory)
    TrainingRecord(base_model="b", quantization=scheme, base_sha256=TrainingBase(base).sha256()).save(directory)
    return directory


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_a_plan_knows_what_will_be_written_and_writes_nothing(
    family: str, checkpoint_dir: CheckpointFactory, adapter_dir: AdapterFactory, tmp_path: Path
) -> None:
    plan = plan_export(checkpoint_dir(family), adapter_dir(family), tmp_path / "a" / "out", quantization="nf4")
    assert (plan.precision, plan.provider, plan.base.scheme.method) == ("fp32", "cpu", "nf4")
    assert plan.compute_dtype == "fp32"
    assert plan.branch is None
    assert len(plan.adapters) == 1
    assert plan.records == {}
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_expected_bytes_are_those_of_the_weights(precision: str, tiny_export: ExportFactory) -> None:
    base, adapter, result = tiny_export("llama", "nf4", precision=precision)
    plan = plan_export(base, adapter, result.output, precision=precision, quantization="nf4", overwrite=True)
    assert plan.expected_bytes == sum(p.numel() for p in tiny_model("llama").parameters()) * int(precision[2:]) // 8


@pytest.mark.parametrize(("provider", "precision"), [("cpu", "fp32"), ("cuda", "fp16")])
def test_each_provider_has_a_precision_of_its_own(
    provider: str, precision: str, checkpoint_dir: CheckpointFactory, tmp_path: Path
) -> None:
    plan = plan_export(checkpoint_dir("llama"), None, tmp_path / "out", provider=provider)
    assert (plan.precision, plan.base.scheme.method) == (precision, "none")


def test_auto_reads_the_checkpoints_own_quantization(
    checkpoint_dir: CheckpointFactory, adapter_dir: AdapterFactory, tmp_path: Path
) -> None:
    plan = plan_export(checkpoint_dir("llama", "fp4"), adapter_dir("llama"), tmp_path / "out")
    assert plan.base.scheme.method == "fp4"


def test_auto_reads_the_record_of_the_training(checkpoint_dir: CheckpointFactory, tmp_path: Path) -> None:
    scheme = QuantizationScheme(method="fp4", blocksize=128, double_quant=False, skip_modules=("o_proj",))
    adapter = _recorded(checkpoint_dir("llama"), tmp_path / "adapter", scheme)
    assert plan_export(checkpoint_dir("llama"), adapter, tmp_path / "out").base.scheme == scheme
    # Naming the method as well takes nothing of the record away.
    named = plan_export(checkpoint_dir("llama"), adapter, tmp_path / "out", quantization="fp4")
    assert named.base.scheme == scheme


def test_without_a_word_about_the_base_nothing_is_guessed(
    checkpoint_dir: CheckpointFactory, adapter_dir: AdapterFactory, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="not known which base"):
        plan_export(checkpoint_dir("llama"), adapter_dir("llama"), tmp_path / "out")


def test_a_record_of_another_base_is_refused_although_every_shape_fits(
    checkpoint_dir: CheckpointFactory, tmp_path: Path
) -> None:
    adapter = _recorded(checkpoint_dir("llama"), tmp_path / "adapter", QuantizationScheme(method="nf4"))
    other = checkpoint_dir("llama", seed=5)
    with pytest.raises(AdapterError, match="another base") as caught:
        plan_export(other, adapter, tmp_path / "out")
    assert TrainingBase(other).sha256()[:16] in caught.value.details["found"]
    assert TrainingBase(checkpoint_dir("llama")).sha256()[:16] in caught.value.details["expected"]


@pytest.mark.parametrize("asked", ["none", "int8"])
def test_a_quantized_checkpoint_is_not_called_otherwise(
    asked: str, checkpoint_dir: CheckpointFactory, adapter_dir: AdapterFactory, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match="quantized already"):
        plan_export(checkpoint_dir("llama", "nf4"), adapter_dir("llama"), tmp_path / "out", quantization=asked)


def test_the_output_is_looked_at_before_the_model(tmp_path: Path) -> None:
    """An hour of hashing must not end with "the output exists"."""
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="the output exists"):
        plan_export(tmp_path / "nowhere", None, tmp_path)
    with pytest.raises(OutputError, match="is a file"):
        plan_export(tmp_path / "nowhere", None, tmp_path / "file", overwrite=True)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_tie_is_broken_where_the_adapter_breaks_it_and_nowhere_else(
    family: str, checkpoint_dir: CheckpointFactory, adapter_dir: AdapterFactory, tmp_path: Path
) -> None:
    """The base's own configuration stays as it was: the twin of the parity check reads it."""
    base = checkpoint_dir(family, tie_word_embeddings=True)
    before = tree(base)
    embedding = "transformer.wte.weight" if family == "gpt2" else "model.embed_tokens.weight"
    target = "c_attn" if family == "gpt2" else "q_proj"
    kept = plan_export(base, adapter_dir(family), tmp_path / "out", quantization="none")
    broken = plan_export(
        base, adapter_dir(family, target_modules=["lm_head", target]), tmp_path / "out", quantization="none"
    )
    for plan, heads in ((kept, {embedding}), (broken, {embedding, "lm_head.weight"})):
        assert {name for name in plan.lowered.graph.sources if name in (embedding, "lm_head.weight")} == heads
        assert plan.base.config.tie_word_embeddings is True
    assert tree(base) == before
