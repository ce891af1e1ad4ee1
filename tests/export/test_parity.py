"""Every family on every base, merged, in onnxruntime: the function that was trained, and not the base's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from lora_deploy.adapter import load_adapter
from lora_deploy.export import export_onnx
from lora_deploy.quantization import QuantizationScheme, quantized_weight
from lora_deploy.quantization.base import TrainingBase
from lora_deploy.run import OnnxSession
from lora_deploy.verify.reference import load_twin
from tests.conftest import QUANTIZED, TINY_FAMILIES, CheckpointFactory, logits, token_ids
from tests.export.conftest import ExportFactory

METHODS = ("none", *QUANTIZED)


def _onnx_logits(directory: Path, ids: torch.Tensor) -> torch.Tensor:
    found, _ = OnnxSession(directory).forward(ids.numpy(), np.ones_like(ids.numpy()))
    return torch.from_numpy(found)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_merged_export_passes_the_gate_and_the_base_alone_does_not(
    family: str, method: str, tiny_export: ExportFactory
) -> None:
    _, _, result = tiny_export(family, method)
    assert result.report is not None
    assert result.report.passed
    assert result.report.control_failed
    assert len(result.report.cases) == 6
    for case in result.report.cases:
        assert case.export.max_abs <= 1e-3
        assert case.export.mean_kl <= 1e-6
        assert case.export.top1 == 1.0
        assert case.control is not None
        assert case.control.max_abs > 10 * 1e-3


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_checkpoints_that_transformers_quantized_export_to_the_same_function(
    family: str,
    method: str,
    checkpoint_dir: CheckpointFactory,
    adapter_dir: Callable[..., Path],
    tiny_export: ExportFactory,
    tmp_path: Path,
) -> None:
    if method == "none":
        base = checkpoint_dir(family, "none", max_shard_size="20KB")  # sharded
    else:
        base = checkpoint_dir(family, method, max_shard_size="20KB")
    quantization = "none" if method == "none" else "auto"
    export_onnx(base, adapter_dir(family), output=tmp_path / "out", quantization=quantization, verify=False)
    _, _, result = tiny_export(family, method)
    ids = token_ids()
    assert torch.equal(_onnx_logits(tmp_path / "out", ids), _onnx_logits(result.output, ids))


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_half_precisions_pass_their_own_gates(family: str, precision: str, tiny_export: ExportFactory) -> None:
    provider = "cuda" if precision == "bf16" else "cpu"
    _, _, result = tiny_export(family, "nf4", precision=precision, provider=provider)
    assert result.report is not None
    assert result.report.passed
    assert result.report.control_failed
    assert (result.report.precision == "bf16 weights") == (precision == "bf16")


def test_merging_into_the_original_weights_would_be_another_function(tiny_export: ExportFactory) -> None:
    """What other exporters do with a QLoRA adapter must be visible to our tolerance."""
    base, adapter, result = tiny_export("llama", "nf4")
    ids = token_ids()
    original = load_adapter(load_twin(TrainingBase(base)), adapter).eval()
    assert (logits(original, ids) - _onnx_logits(result.output, ids)).abs().max() > 1e-2


def test_the_twin_holds_the_weights_that_bitsandbytes_dequantizes(checkpoint_dir: CheckpointFactory) -> None:
    scheme = QuantizationScheme(method="nf4")
    base = TrainingBase(checkpoint_dir("gpt2"), scheme)
    stored = TrainingBase(checkpoint_dir("gpt2", "nf4"))
    for name in base.linears:
        expected = stored.weight(name).dequantize()
        assert torch.equal(quantized_weight(load_twin(base).get_submodule(name)).dequantize(), expected)
        assert torch.equal(quantized_weight(load_twin(stored).get_submodule(name)).dequantize(), expected)


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_trained_modules_and_biases_are_exported(
    family: str, checkpoint_dir: CheckpointFactory, adapter_dir: Callable[..., Path], tmp_path: Path
) -> None:
    """GPT-2's head is tied to its embedding: an adapter that trains the head breaks the tie, in the graph too."""
    adapter = adapter_dir(family, bias="all", modules_to_save=["lm_head"], r=3, lora_alpha=7)
    result = export_onnx(checkpoint_dir(family), adapter, output=tmp_path / "out", quantization="int8")
    assert result.report is not None
    assert result.report.passed
    assert result.report.bitsandbytes_gap is not None
    assert result.report.bitsandbytes_gap.max_abs > 1e-3


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_tied_embeddings_stay_tied(family: str, tmp_path: Path, adapter_dir: Callable[..., Path]) -> None:
    import onnx_ir as ir

    from tests.conftest import save_tiny

    base = save_tiny(family, "none", tmp_path / "base", tie_word_embeddings=True)
    result = export_onnx(base, adapter_dir(family), output=tmp_path / "out", quantization="nf4")
    assert result.report is not None
    assert result.report.passed
    initializers = ir.load(result.output / "model.onnx").graph.initializers
    assert len([name for name in initializers if "wte" in name or "embed_tokens" in name or "lm_head" in name]) == 1


def test_a_model_whose_weight_the_graph_drops_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """mobius 0.1.0 leaves out the biases of Llama's MLP without a word."""
    from lora_deploy.errors import CheckpointError
    from lora_deploy.export import source
    from tests.conftest import save_tiny

    base = save_tiny("llama", "none", tmp_path / "base", mlp_bias=True)
    with pytest.raises(CheckpointError, match="mobius is not known to build the right graph") as caught:
        export_onnx(base, output=tmp_path / "out", graph="mobius")
    assert caught.value.details["tensor"] == "mlp_bias"
    monkeypatch.setattr(source, "_fault", lambda config: None)  # and if that had been forgotten
    with pytest.raises(CheckpointError, match="leaves one of its weights out") as caught:
        export_onnx(base, output=tmp_path / "out", graph="mobius")
    assert "mlp" in caught.value.details["tensor"]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_an_adapted_output_head_is_exported(
    family: str, checkpoint_dir: CheckpointFactory, adapter_dir: Callable[..., Path], tmp_path: Path
) -> None:
    """GPT-2's is tied: its embedding must stay the base's."""
    target = "q_proj" if family == "llama" else "c_attn"
    adapter = adapter_dir(family, target_modules=["lm_head", target])
    result = export_onnx(checkpoint_dir(family), adapter, output=tmp_path / "out", quantization="fp4")
    assert result.report is not None
    assert result.report.passed
