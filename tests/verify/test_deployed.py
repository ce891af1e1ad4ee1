"""The export against the twin of its own weights: rounded anew, transcoded, corrected; and what must be found."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from lora_deploy.adapter import read_adapter
from lora_deploy.errors import ParityError
from lora_deploy.requantize import Requantization
from lora_deploy.run import OnnxSession
from lora_deploy.verify.batches import make_batches
from lora_deploy.verify.cases import compare_batch
from lora_deploy.verify.codes import check_codes
from lora_deploy.verify.deployed import DeployedWeights, load_deployed_twin
from lora_deploy.verify.parity import check_parity
from lora_deploy.verify.reference import compute_logits
from lora_deploy.verify.sessions import run_export
from lora_deploy.verify.tolerances import TOLERANCES
from tests.conftest import TINY_FAMILIES
from tests.export.conftest import BranchExport, BranchFactory


def _rounded(factory: BranchFactory, family: str = "llama", bits: int = 4, **options: Any) -> BranchExport:
    """A merged export whose weights were rounded, unchecked unless `verify` is given."""
    fields = {key: options.pop(key) for key in list(options) if key in ("rows", "keep", "correction", "head")}
    asked = Requantization(bits, **{"rows": 0, "blocksize": 16, **fields})  # type: ignore[arg-type]
    return factory(family, "nf4", None, precision=f"int{bits}", requantization=asked, **options)


@pytest.mark.parametrize("rows", [0, 4])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_onnxruntime_computes_what_the_codes_stand_for(
    family: str, bits: int, rows: int, branch_export: BranchFactory
) -> None:
    report = _rounded(branch_export, family, bits, rows=rows, verify=True).result.report
    assert report is not None
    assert (report.precision, report.passed, report.control_failed) == ("fp32", True, True)
    assert all(case.export.max_abs <= 1e-3 for case in report.cases)
    assert all(case.control is not None and case.control.max_abs > 0.1 for case in report.cases)
    assert report.codes is not None
    assert report.codes.requantized
    assert report.activation_rounding is not None
    assert 1e-8 < report.activation_rounding.mean_kl < 1
    assert report.deployment is not None


@pytest.mark.parametrize(
    "options",
    [
        {"accuracy_level": 0},
        {"keep": (("v_proj", None), ("layers.1", 8))},
        {"correction": 3, "rows": 4},
        {"correction": 3, "rows": 4, "family": "gpt2"},
        {"head": None},
        {"head": None, "family": "gpt2"},
        {"compute_dtype": "fp16", "provider": "cuda"},
        {"compute_dtype": "fp16", "provider": "cuda", "correction": 3, "rows": 4},
        {"adapters": {}},
        {"adapters": {"own": {"target_modules": ["lm_head", "c_attn"]}}, "family": "gpt2"},
        {"adapters": {"own": {"bias": "all", "modules_to_save": ["lm_head"]}}, "family": "gpt2"},
    ],
    ids=str,
)
def test_every_kind_of_export_passes(options: dict[str, Any], branch_export: BranchFactory) -> None:
    report = _rounded(branch_export, **{"verify": True, **options}).result.report
    assert report is not None
    assert report.passed
    assert report.precision == ("fp16" if "compute_dtype" in options else "fp32")
    exact = options.get("accuracy_level") == 0 or "provider" in options
    assert (report.activation_rounding is None) is exact


def test_a_transcoded_base_beside_a_branch_is_compared_with_its_own_values(branch_export: BranchFactory) -> None:
    options = {"precision": "int8", "accuracy_level": 4, "adapters": {"a": {}, "b": {"seed": 3}}, "verify": True}
    report = branch_export("llama", "nf4", "hot-swap", **options).result.report
    assert report is not None
    assert report.passed
    assert max(case.export.max_abs for case in report.cases) <= 1e-3
    assert report.activation_rounding is not None
    assert report.deployment is not None
    assert report.deployment.adapter == "a"
    assert report.deployment.survives == pytest.approx(1, abs=0.05)
    assert any("with a only" in note for note in report.notes)


@pytest.fixture
def copied(branch_export: BranchFactory, tmp_path: Path) -> Callable[..., tuple[BranchExport, Path]]:
    """`copied(**options)`: an export, and a copy of it that the test may damage."""

    def copy(**options: Any) -> tuple[BranchExport, Path]:
        export = _rounded(branch_export, **options)
        return export, Path(shutil.copytree(export.output, tmp_path / "copy"))

    return copy


def _flip(directory: Path, name: str) -> None:
    """Another value in an initializer, the data file's own hash apart."""
    tensor = ir.load(directory / "model.onnx").graph.initializers[name].const_value
    assert isinstance(tensor, ir.ExternalTensor)
    file = directory / str(tensor.location)
    data = bytearray(file.read_bytes())
    data[(tensor.offset or 0) + tensor.nbytes // 2] ^= 0x10
    file.write_bytes(data)


@pytest.mark.parametrize("side", ["codes", "scales"])
@pytest.mark.parametrize("number", [0, -1])
@pytest.mark.parametrize("provider", ["cpu", "cuda"])
def test_a_flipped_bit_is_found(
    side: str, number: int, provider: str, copied: Callable[..., tuple[BranchExport, Path]]
) -> None:
    export, directory = copied(provider=provider, **({"compute_dtype": "fp16"} if provider == "cuda" else {}))
    check_codes(directory, export.base)
    weight = DeployedWeights(directory).manifest.coded[number]
    _flip(directory, getattr(weight, side))
    with pytest.raises(ParityError, match="not those that were made for it") as caught:
        check_codes(directory, export.base)
    assert caught.value.details["tensor"] in [module.name for module in weight.modules]


def test_a_changed_correction_is_found(copied: Callable[..., tuple[BranchExport, Path]]) -> None:
    export, directory = copied(correction=3, rows=4)
    check_codes(directory, export.base)
    model = ir.load(directory / "model.onnx")
    name = DeployedWeights(directory).manifest.correction[0].input_names[2]
    codes = model.graph.initializers[name].const_value
    assert codes is not None
    model.graph.initializers[name].const_value = ir.Tensor(codes.numpy() ^ 1, name=name)
    (directory / "model.onnx").write_bytes(ir.to_proto(model).SerializeToString())
    with pytest.raises(ParityError, match="the correction in the export"):
        check_codes(directory, export.base)


def test_the_correction_is_read_as_it_was_made(branch_export: BranchFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its error is that of int8, for q, k and v of different heights, too."""
    from lora_deploy.export import rounded

    made: list[Any] = []
    real = rounded.RoundedWeights.correction

    def keep(self: rounded.RoundedWeights) -> Any:
        made.append(real(self))
        return made[-1]

    monkeypatch.setattr(rounded.RoundedWeights, "correction", keep)
    export = _rounded(branch_export, correction=5, rows=5)
    found = DeployedWeights(export.output).corrections
    assert set(found) == set(made[0].updates)
    for name, update in made[0].updates.items():
        expected = update.delta_weight()
        assert (found[name].delta_weight() - expected).norm() < 0.02 * expected.norm()


def _zero_point(model: ir.Model, node: ir.Node) -> None:
    assert node.inputs[2] is not None
    assert node.inputs[2].const_value is not None
    rows, blocks = node.inputs[2].const_value.shape.numpy()
    points = np.full(rows * -(-blocks // 2), 0x77, np.uint8)
    value = ir.val("points", const_value=ir.Tensor(points, name="points"))
    model.graph.initializers["points"] = value
    node.resize_inputs(4)
    node.replace_input_with(3, value)


def _other_scales(model: ir.Model, node: ir.Node) -> None:
    same = (one for one in model.graph if one.op_type == "MatMulNBits" and one is not node)
    shape = node.inputs[2].shape  # type: ignore[union-attr]
    other = next(one for one in same if one.inputs[2] is not None and one.inputs[2].shape == shape)
    node.replace_input_with(2, other.inputs[2])


@pytest.mark.parametrize("wrong", [_zero_point, _other_scales])
def test_a_graph_that_reads_the_codes_wrongly_fails(
    wrong: Callable[[ir.Model, ir.Node], None], copied: Callable[..., tuple[BranchExport, Path]]
) -> None:
    export, directory = copied()
    model = ir.load(directory / "model.onnx")
    nodes = [node for node in model.graph if node.op_type == "MatMulNBits" and "down_proj" in str(node.name)]
    wrong(model, nodes[0])
    (directory / "model.onnx").write_bytes(ir.to_proto(model).SerializeToString())
    report = check_parity(directory, export.base, {"own": read_adapter(export.adapters["own"])})
    assert not report.passed
    assert not all(case.passed for case in report.cases)


def test_the_twin_of_a_base_rounded_without_its_update_fails(branch_export: BranchFactory) -> None:
    export, bare = _rounded(branch_export), _rounded(branch_export, adapters={})
    adapter = read_adapter(export.adapters["own"])
    batch = make_batches(export.base)[0]
    found = run_export(OnnxSession(export.output, exact_activations=True), batch, {})
    passed = []
    for directory in (export.output, bare.output):
        twin = load_deployed_twin(directory, export.base, adapter)
        logits = compute_logits(twin, batch.input_ids, batch.attention_mask)
        passed.append([case.passed for case in compare_batch("", batch, logits, found, None, TOLERANCES["fp32"])])
    assert passed == [[True, True], [False, False]]


def test_the_rounding_of_activations_is_taken_out_in_memory_only(branch_export: BranchFactory) -> None:
    export = _rounded(branch_export)
    before = (export.output / "model.onnx").read_bytes()
    batch = make_batches(export.base)[0]
    exact, rounded = (
        run_export(OnnxSession(export.output, exact_activations=exact), batch, {}) for exact in (True, False)
    )
    assert not torch.equal(exact, rounded)
    assert (export.output / "model.onnx").read_bytes() == before
