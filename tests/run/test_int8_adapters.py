"""Adapters in int8 slots: by onnxruntime's own LoraAdapter, blended, batched, converted, described, refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from lora_deploy.adapter import read_adapter
from lora_deploy.adapter.packing import deployed_adapter
from lora_deploy.errors import AdapterError, UsageError
from lora_deploy.export import export_onnx
from lora_deploy.export.inspect import describe_adapter
from lora_deploy.export.onnx_adapter import convert_adapter
from lora_deploy.integrity import find_adapters
from lora_deploy.manifest import Manifest
from lora_deploy.run import OnnxModel, OnnxSession
from lora_deploy.run.adapter_files import Tensors, read_onnx_adapter, read_tensors
from lora_deploy.run.adapters import Adapters
from lora_deploy.verify.reference import compute_logits, load_twin
from tests.conftest import token_ids
from tests.export.conftest import BranchExport, BranchFactory
from tests.run.test_adapter_files import write

ADAPTERS = {"own": {}, "wide": {"r": 8, "seed": 3}, "narrow": {"r": 2, "seed": 4, "target_modules": ["q_proj"]}}
IDS = token_ids(3, 7).numpy()
MASK = np.ones_like(IDS)
SITE = "model/layers/1/self_attn/o_proj"
CODES_A, SCALES_A, CODES_B, SCALES_B = (f"{SITE}/lora_{side}_{part}" for side in "AB" for part in ("codes", "scales"))


@pytest.fixture
def int8(branch_export: BranchFactory) -> BranchExport:
    return branch_export("llama", "nf4", adapters=ADAPTERS, adapter_precision="int8")


@pytest.fixture
def floats(branch_export: BranchFactory) -> BranchExport:
    return branch_export("llama", "nf4", adapters=ADAPTERS)


def _open(export: BranchExport) -> tuple[OnnxSession, Adapters]:
    session = OnnxSession(export.output)
    return session, Adapters(session, export.output)


def _logits(session: OnnxSession, inputs: Any = None) -> np.ndarray:
    return session.forward(IDS, MASK, None, inputs)[0]


def _twin_of_sum(export: BranchExport, weights: dict[str, float]) -> np.ndarray:
    """The twin with the weighted sum of the rounded updates in its weights."""
    twin = load_twin(export.base)
    slots = Manifest.load(export.output).slots
    for name, weight in weights.items():
        for module, update in deployed_adapter(read_adapter(export.adapters[name]), slots).updates.items():
            twin.get_submodule(module).weight.data += weight * update.delta_weight()  # type: ignore[operator]
    return compute_logits(twin, torch.from_numpy(IDS), torch.from_numpy(MASK)).numpy()


@pytest.mark.parametrize("name", ADAPTERS)
def test_onnxruntimes_own_adapter_gives_the_same_bit_for_bit(name: str, int8: BranchExport) -> None:
    session, adapters = _open(int8)
    found = _logits(session, adapters.inputs(name))
    feeds = {"input_ids": IDS, "attention_mask": MASK}
    if session.has_position_ids:
        feeds["position_ids"] = np.cumsum(MASK, axis=1) - 1
    feeds |= {key: value.numpy() for key, value in session.empty_cache(len(IDS)).items()}
    lora, options = onnxruntime.LoraAdapter(), onnxruntime.RunOptions()
    lora.Load(str(find_adapters(int8.output)[name]))
    options.add_active_adapter(lora)
    assert np.array_equal(session.session.run(["logits"], feeds, options)[0], found)
    assert np.abs(found - _twin_of_sum(int8, {name: 1.0})).max() < 1e-3
    assert np.abs(found - _logits(session)).max() > 0.1


def test_switching_leaves_nothing_to_the_next(int8: BranchExport) -> None:
    fresh = {}
    for name in (None, *ADAPTERS):
        session, adapters = _open(int8)
        fresh[name] = _logits(session, adapters.inputs(name))
    session, adapters = _open(int8)
    for name in ("own", None, "wide", "narrow", "own", None, "narrow", "wide"):
        assert np.array_equal(_logits(session, adapters.inputs(name)), fresh[name])


@pytest.mark.parametrize("weights", [{"own": 0.3, "wide": 0.7}, {"own": 1.0, "narrow": -0.5, "wide": 0.25}], ids=str)
def test_a_blend_is_the_twin_with_the_summed_update(weights: dict[str, float], int8: BranchExport) -> None:
    session, adapters = _open(int8)
    inputs = adapters.inputs(weights)
    found = _logits(session, inputs)
    assert np.abs(found - _twin_of_sum(int8, weights)).max() < 1e-3
    assert np.abs(found - _logits(session)).max() > 0.1
    assert inputs[CODES_B].numpy().dtype == np.int8  # the weight is in the scales


def test_a_blend_of_one_whole_adapter_is_that_adapter(int8: BranchExport) -> None:
    session, adapters = _open(int8)
    own = _logits(session, adapters.inputs("own"))
    assert np.array_equal(_logits(session, adapters.inputs({"own": 1.0})), own)
    assert np.abs(_logits(session, adapters.inputs({"own": 1.0, "wide": 0.0})) - own).max() < 1e-5


@pytest.mark.parametrize(("compute", "weight"), [("fp32", 1e39), ("fp16", 2e5)])
def test_a_blend_that_overflows_is_refused(compute: str, weight: float, branch_export: BranchFactory) -> None:
    """In fp16 it is not the scale that overflows, but the scale times the code."""
    made = branch_export("llama", "nf4", adapters=ADAPTERS, compute_dtype=compute, adapter_precision="int8")
    _, adapters = _open(made)
    with pytest.raises(UsageError, match="too large") as caught:
        adapters.inputs({"own": weight})
    assert "own" in caught.value.details["found"]


def test_text_is_generated_in_batches_with_any_adapter(talking_branch: Callable[..., Path], tmp_path: Path) -> None:
    floats = talking_branch()
    root = floats.parent
    options: dict[str, Any] = {"merge": False, "quantization": "nf4", "verify": False, "adapter_precision": "int8"}
    export_onnx(root / "base", {name: root / name for name in "ab"}, output=tmp_path / "out", **options)
    model = OnnxModel(tmp_path / "out")
    prompts, answers = ["Hi", "What is the time in the city of Paris?"], []
    for adapter in (None, "a", "b", {"a": 0.5, "b": 0.5}):
        model.set_adapter(adapter)
        answers.append(model.generate_batch(prompts, max_new_tokens=12))
        assert answers[-1] == [model.generate(prompt, max_new_tokens=12) for prompt in prompts]
    assert len({tuple(answer) for answer in answers}) == 4
    assert answers[0] == OnnxModel(floats).generate_batch(prompts, max_new_tokens=12)


@pytest.mark.parametrize("compute", ["fp32", "fp16"])
def test_a_converted_adapter_is_the_file_that_export_writes(
    compute: str, branch_export: BranchFactory, tmp_path: Path
) -> None:
    made = branch_export("llama", "nf4", adapters=ADAPTERS, compute_dtype=compute, adapter_precision="int8")
    output = Path(shutil.copytree(made.output, tmp_path / "out"))
    expected = find_adapters(output)["wide"].read_bytes()
    assert convert_adapter(made.adapters["wide"], output, "again").read_bytes() == expected
    _, tensors = read_tensors(find_adapters(output)["again"])
    slots = Manifest.load(output).slots
    assert set(tensors) == {name for slot in slots for name in slot.input_names}
    assert len(tensors) == 4 * len(slots)
    # The four tensors of a slot are the same whatever the graph computes in.
    assert {str(array.dtype) for array in tensors.values()} == {"int8", "float32"}


def test_inspect_tells_of_a_file_what_it_tells_of_the_directory(int8: BranchExport) -> None:
    of_file = describe_adapter(find_adapters(int8.output)["own"])
    of_directory = describe_adapter(int8.adapters["own"])
    squares = [sum(update.norm_delta**2 for update in found.updates) for found in (of_file, of_directory)]
    assert squares[0] == pytest.approx(squares[1], rel=1e-2)
    slots = {update.name: update for update in of_file.updates}
    assert (slots[SITE.replace("/", ".")].rank, slots[SITE.replace("/", ".")].inputs) == (4, 64)


def test_a_file_for_slots_of_the_other_kind_is_refused_and_says_so(int8: BranchExport, floats: BranchExport) -> None:
    for ours, theirs, found in ((int8, floats, "int8"), (floats, int8, "floats")):
        with pytest.raises(AdapterError, match="stored in another way") as caught:
            read_onnx_adapter(find_adapters(ours.output)["own"], Manifest.load(theirs.output))
        assert found in caught.value.details["found"]
        assert found not in caught.value.details["expected"]
        assert "adapter convert" in caught.value.details["remedy"]


def _change(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({name: np.ascontiguousarray(change(tensors[name]))})


def _set(value: float) -> Callable[[np.ndarray], np.ndarray]:
    def change(array: np.ndarray) -> np.ndarray:
        array = array.copy()
        array.flat[array.size // 2] = value
        return array

    return change


DAMAGE: dict[str, tuple[Callable[[Tensors], object], str]] = {
    "no codes of A": (lambda t: t.pop(CODES_A), "only 3 of 4 tensors"),
    "no scales of A": (lambda t: t.pop(SCALES_A), "only 3 of 4 tensors"),
    "no codes of B": (lambda t: t.pop(CODES_B), "only 3 of 4 tensors"),
    "no scales of B": (lambda t: t.pop(SCALES_B), "only 3 of 4 tensors"),
    "no scales": (lambda t: (t.pop(SCALES_A), t.pop(SCALES_B)), "only 2 of 4 tensors"),
    "no layer": (lambda t: [t.pop(n) for n in (CODES_A, SCALES_A, CODES_B, SCALES_B)], "lacks a layer"),
    "another layer": (lambda t: t.update({"model/layers/9/lora_A_codes": t[CODES_A]}), "does not have"),
    "floats beside": (lambda t: t.update({f"{SITE}/lora_A": t[SCALES_A]}), "does not have"),
    "unsigned codes": (_change(CODES_A, lambda a: a.view(np.uint8)), "does not fit its slot"),
    "codes as floats": (_change(CODES_B, lambda a: a.astype(np.float32)), "does not fit its slot"),
    "half-precision scales": (_change(SCALES_B, lambda a: a.astype(np.float16)), "does not fit its slot"),
    "flat codes": (_change(CODES_A, lambda a: a.reshape(-1, a.shape[-1])), "does not fit its slot"),
    "a scalar": (_change(CODES_A, lambda a: a.reshape(-1)[:1].reshape(())), "does not fit its slot"),
    "a block less": (_change(CODES_B, lambda a: a[:, :-1]), "does not fit its slot"),
    "other blocks": (_change(CODES_A, lambda a: a.reshape(-1, 16, a.shape[-1])), "does not fit its slot"),
    "a scale less": (_change(SCALES_A, lambda a: a[:-1]), "does not fit its slot"),
    "ranks that differ": (_change(CODES_B, lambda a: a[:-1]), "does not fit its slot"),
    "scales of another rank": (_change(SCALES_B, lambda a: a[:-1]), "does not fit its slot"),
    "NaN": (_change(SCALES_A, _set(float("nan"))), "NaN or infinity"),
    "infinity": (_change(SCALES_B, _set(float("inf"))), "NaN or infinity"),
    "a code of -128": (_change(CODES_B, _set(-128)), "a code that quantization never gives"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_an_adapter_that_does_not_fit_is_refused_by_name(damage: str, int8: BranchExport, tmp_path: Path) -> None:
    change, message = DAMAGE[damage]
    version, tensors = read_tensors(find_adapters(int8.output)["own"])
    change(tensors)
    file = write(tmp_path / "a.onnx_adapter", tensors, version)
    with pytest.raises(AdapterError, match=message) as caught:
        read_onnx_adapter(file, Manifest.load(int8.output))
    assert caught.value.details["file"] == str(file)
    assert "model" in caught.value.details["tensor"]


@pytest.mark.parametrize("damage", ["no scales of A", "flat codes", "a scale less", "a scalar"])
def test_inspect_names_an_update_that_is_not_whole(damage: str, int8: BranchExport, tmp_path: Path) -> None:
    version, tensors = read_tensors(find_adapters(int8.output)["own"])
    DAMAGE[damage][0](tensors)
    with pytest.raises(AdapterError, match="not whole") as caught:
        describe_adapter(write(tmp_path / "a.onnx_adapter", tensors, version))
    assert SITE in caught.value.details["tensor"]


def test_a_rank_of_zero_is_fine(int8: BranchExport, tmp_path: Path) -> None:
    version, tensors = read_tensors(find_adapters(int8.output)["own"])
    for name in (CODES_A, SCALES_A):
        tensors[name] = tensors[name][..., :0].copy()
    for name in (CODES_B, SCALES_B):
        tensors[name] = tensors[name][:0].copy()
    session, adapters = _open(int8)
    adapters.add(write(tmp_path / "less.onnx_adapter", tensors, version))
    assert np.abs(_logits(session, adapters.inputs("less")) - _logits(session, adapters.inputs("own"))).max() > 0.01
