"""An export that is not what was trained ends with 4, and nothing of it is committed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_deploy.adapter import LoraUpdate
from lora_deploy.export import merge
from lora_deploy.quantization.base import TrainingBase
from lora_deploy.quantization.weight import DenseWeight
from lora_deploy.verify import sessions
from lora_deploy.verify.tolerances import TOLERANCES, Tolerance
from tests.commands import assert_one_message, tree
from tests.faults.conftest import Place

Patch = pytest.MonkeyPatch
FAILED = "the export does not compute what was trained"


def _scaled_wrongly(patch: Patch) -> None:
    real = LoraUpdate.merge_into
    patch.setattr(LoraUpdate, "merge_into", lambda update, values: real(update, real(update, values)))


def _left_out(patch: Patch) -> None:
    patch.setattr(LoraUpdate, "merge_into", lambda update, values: values)


def _original_weights(patch: Patch) -> None:
    """Merge into the weights from before the quantization, as other exporters do."""

    def original(self: TrainingBase, module: str) -> DenseWeight:
        return DenseWeight(self.tensor(f"{module}.weight"))

    patch.setattr(TrainingBase, "weight", original)


def _one_layer_left_out(patch: Patch) -> None:
    real = merge.MergedParameters._linear

    def linear(self: merge.MergedParameters, module: str) -> torch.Tensor:
        if module.endswith("layers.1.self_attn.v_proj"):
            return self.base.weight(module).dequantize()
        return real(self, module)

    patch.setattr(merge.MergedParameters, "_linear", linear)


def _impossible_tolerance(patch: Patch) -> None:
    patch.setitem(TOLERANCES, "fp32", Tolerance(kl=0.0, top1=1.0, tie_margin=0.0, max_abs=0.0))


def _cache_lost(patch: Patch) -> None:
    """A decode step that reads an older cache: only the decoding phase can see it."""
    real: Callable[..., Any] = sessions.OnnxSession.forward
    first: dict[int, Any] = {}

    def forward(self: Any, ids: Any, mask: Any, cache: Any = None, adapter: Any = None) -> Any:
        logits, cache = real(self, ids, mask, cache, adapter)
        return (logits if ids.shape[1] > 1 else logits[:, ::-1] * 1.01), first.setdefault(0, cache) and cache

    patch.setattr(sessions.OnnxSession, "forward", forward)


WRONG = {
    "the adapter is added twice": _scaled_wrongly,
    "the adapter is left out": _left_out,
    "the adapter is left out of one layer": _one_layer_left_out,
    "the base is the unquantized one": _original_weights,
    "decoding is off by a percent": _cache_lost,
    "the tolerance is nought": _impossible_tolerance,
}


@pytest.mark.parametrize("bug", WRONG)
def test_a_wrong_export_ends_with_four_and_is_not_there(bug: str, place: Place, monkeypatch: Patch) -> None:
    WRONG[bug](monkeypatch)
    before = tree(place.root)
    ended = place.export()
    assert_one_message(ended, 4, FAILED, place.output, "FAIL", "max abs", "base alone: KL", "--no-verify")
    assert ("FAIL prefill, left-padded" in ended.err) == (bug != "decoding is off by a percent")
    assert "FAIL decode, left-padded" in ended.err
    assert tree(place.root) == before


def test_a_wrong_export_leaves_the_older_one_with_overwrite(place: Place, monkeypatch: Patch) -> None:
    assert place.export(quantization="fp4").code == 0
    before = tree(place.root)
    _scaled_wrongly(monkeypatch)
    assert_one_message(place.export("--overwrite"), 4, FAILED)
    assert tree(place.root) == before


def test_without_verification_a_wrong_export_is_written_without_a_report(place: Place, monkeypatch: Patch) -> None:
    _left_out(monkeypatch)
    assert place.export("--no-verify").code == 0
    assert (place.output / "model.onnx").is_file()
    assert not (place.output / "parity.json").exists()


def _untrain(place: Place, factor: float) -> None:
    file = place.adapter / "adapter_model.safetensors"
    save_file(
        {name: values * factor if "lora_B" in name else values for name, values in load_file(file).items()},
        file,
        metadata={"format": "pt"},
    )


@pytest.mark.parametrize("factor", [0.0, 1e-7])
def test_an_adapter_that_changes_nothing_proves_nothing(factor: float, place: Place) -> None:
    _untrain(place, factor)
    before = tree(place.root)
    assert_one_message(place.export(), 4, "proves nothing", "was it trained?", place.output, "--no-verify")
    assert tree(place.root) == before
    assert place.export("--no-verify").code == 0


def test_the_base_alone_has_nothing_to_prove_of_an_adapter(place: Place) -> None:
    ended = place.command("export", "--merge", "--quiet", "--model", place.base, "--output", place.output)
    assert ended == (0, "", "")
