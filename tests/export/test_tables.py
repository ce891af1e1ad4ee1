"""Exports of adapters that change tables of tokens: what live PEFT computes, on padded batches, tied and untied."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from lora_deploy import export_onnx, verify_module
from lora_deploy.adapter import read_adapter, write_adapter
from lora_deploy.errors import AdapterError, InputError, ParityError
from lora_deploy.export import ExportResult, merge
from lora_deploy.export.plan import plan_export
from lora_deploy.quantization.base import TrainingBase
from lora_deploy.requantize.options import Requantization
from lora_deploy.run import OnnxSession
from lora_deploy.verify import verify
from lora_deploy.verify.batches import make_batches
from lora_deploy.verify.reference import compute_logits
from tests.adapted_tables import CASES, QUIET, TIED, UNTIED, peft_model, without_tables
from tests.conftest import CheckpointFactory, tiny_model
from tests.export.conftest import SHORT, distance, run_batch

pytestmark = QUIET
TABLES = {"model.embed_tokens.weight", "lm_head.weight", "transformer.wte.weight"}
FLOAT_TABLES = Requantization(bits=4, head=None)
BUILT_IN = ("LoRA, tied", "LoRA, kept tied", "LoRA on both, tied", "DoRA, untied", "tokens, tied", "saved both, tied")
Made = Callable[[str], tuple[Path, Path]]


@pytest.fixture(scope="module")
def made(checkpoint_dir: CheckpointFactory, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """`made(case)`: directories of a base and of PEFT's adapter."""
    kept: dict[str, tuple[Path, Path]] = {}

    def make(name: str) -> tuple[Path, Path]:
        if name not in kept:
            case = CASES[name]
            base = checkpoint_dir(case.family, **SHORT[case.family], **case.base)
            adapter = tmp_path_factory.mktemp("tables") / "own"
            torch.manual_seed(3)
            model = AutoModelForCausalLM.from_pretrained(base)
            peft_model(model, case.config).save_pretrained(adapter)
            kept[name] = base, adapter
        return kept[name]

    return make


def _logits(model: nn.Module, base: TrainingBase) -> list[torch.Tensor]:
    return [
        compute_logits(model, batch.input_ids, batch.attention_mask) * batch.attention_mask[:, :, None]  # type: ignore[arg-type]
        for batch in make_batches(base)
    ]


def _run(result: ExportResult, base: TrainingBase) -> list[torch.Tensor]:
    session = OnnxSession(result.output)
    return [run_batch(session, batch) for batch in make_batches(base)]


def _mean_distance(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """For codes: single logits of a random model are far off where its rounding is right."""
    return sum(float((one - other).abs().mean()) for one, other in zip(found, expected, strict=True)) / len(found)


def _export(made: Made, name: str, output: Path, **options: Any) -> ExportResult:
    base, adapter = made(name)
    return export_onnx(base, adapter, output=output, quantization="none", **options)


@pytest.mark.parametrize(
    ("name", "how"), [*((name, "merged") for name in CASES), *((name, "fixed") for name in BUILT_IN)]
)
def test_the_export_computes_what_peft_computes(name: str, how: str, made: Made, tmp_path: Path) -> None:
    options: dict[str, Any] = {"merge": True} if how == "merged" else {"merge": False, "branch": "fixed"}
    result = _export(made, name, tmp_path / "out", **options)
    assert result.report is not None
    assert result.report.passed
    assert result.report.control_failed
    directory, adapter = made(name)
    base = TrainingBase(directory)
    found = _run(result, base)
    theirs: Any = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(directory), adapter).eval()
    expected = _logits(theirs, base)
    assert distance(found, expected) <= 1e-3
    without_tables(theirs)
    assert distance(found, _logits(theirs, base)) > 0.01
    assert distance(found, _logits(AutoModelForCausalLM.from_pretrained(directory), base)) > 0.01


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.base is not UNTIED])
def test_a_tie_holds_where_both_sides_change_alike_and_the_user_is_told(name: str, made: Made, tmp_path: Path) -> None:
    base, adapter = made(name)
    alike = CASES[name].alike
    plan = plan_export(base, adapter, tmp_path / "out", quantization="none")
    assert len(TABLES & plan.lowered.graph.sources.keys()) == (1 if alike else 2)
    if name == "GPT-2, positions":
        return
    result = _export(made, name, tmp_path / "out", verify=False)
    said = [warning for warning in result.warnings if "were tied" in warning]
    assert len(said) == 1
    assert ("stay one weight" if alike else "are two weights now") in said[0]


@pytest.mark.parametrize(
    "options",
    [{"precision": "int8", "accuracy_level": 0}, {"precision": "int4", "requantization": FLOAT_TABLES}],
    ids=["int8", "int4 beside tables in floats"],
)
@pytest.mark.parametrize(
    "name",
    [
        "LoRA, tied",
        "LoRA, kept tied",
        "LoRA on the embedding alone",
        "tokens, tied",
        "tokens of both, tied",
        "DoRA, untied",
    ],
)
def test_codes_of_changed_tables(name: str, options: dict[str, Any], made: Made, tmp_path: Path) -> None:
    result = _export(made, name, tmp_path / "out", **options)
    assert result.report is not None
    assert result.report.passed
    assert result.report.control_failed
    directory, adapter = made(name)
    base = TrainingBase(directory)
    assert result.report.deployment is not None
    tables = {table: result.report.deployment.layers[table] for table in read_adapter(adapter).tables}
    assert all(share == pytest.approx(1, abs=0.02) for share in tables.values())
    theirs: Any = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(directory), adapter).eval()
    if options["precision"] == "int8":
        expected = _logits(theirs, base)
        size = _mean_distance(expected, [torch.zeros_like(one) for one in expected])
        assert _mean_distance(_run(result, base), expected) <= 0.05 * size
        without_tables(theirs)
        assert _mean_distance(_run(result, base), _logits(theirs, base)) > 0.2 * size


@pytest.mark.parametrize("method", ["nf4", "int8"])
@pytest.mark.parametrize("branch", [None, "fixed"])
def test_beside_codes_of_the_base_and_again_by_verify(branch: Any, method: str, made: Made, tmp_path: Path) -> None:
    for name in ("LoRA on both, tied", "tokens, tied"):
        base, adapter = made(name)
        output = tmp_path / name
        options: dict[str, Any] = {"merge": branch is None, "branch": branch}
        export_onnx(base, adapter, output=output, quantization=method, **options)
        assert verify(output).passed
        changed = read_adapter(adapter)
        for table in changed.tables.values():
            for values in table.tensors().values():
                values.neg_()
        write_adapter(changed, tmp_path / "other")
        with pytest.raises(InputError, match="not the adapter"):  # its hash knows of tables
            verify(output, adapter=tmp_path / "other")


def test_in_float16(made: Made, tmp_path: Path) -> None:
    report = _export(made, "LoRA, kept tied", tmp_path / "out", precision="fp16").report
    assert report is not None
    assert report.passed


def test_a_doras_magnitudes_untie_what_is_said_to_be_tied(checkpoint_dir: CheckpointFactory, tmp_path: Path) -> None:
    base = checkpoint_dir("llama", **SHORT["llama"], **TIED)
    config = {"target_modules": ["embed_tokens"], "use_dora": True, "ensure_weight_tying": True}
    theirs = peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    theirs.save_pretrained(tmp_path / "own")
    result = export_onnx(base, tmp_path / "own", output=tmp_path / "out", quantization="none")
    assert "are two weights now" in result.warnings[0]
    assert distance(_run(result, TrainingBase(base)), _logits(theirs, TrainingBase(base))) <= 1e-3


@pytest.mark.parametrize("options", [{}, {"merge": False, "branch": "fixed"}, {"precision": "int4"}], ids=str)
@pytest.mark.parametrize("name", ["LoRA, tied", "tokens, tied"])
def test_a_change_that_is_lost_fails_the_gate(
    name: str, options: dict[str, Any], made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merge, "table_change", lambda *_: None)
    if "precision" in options:  # it is then in the deployed twin too: what is measured of it must say so
        options = options | {"max_kl": 0.05}
    with pytest.raises(ParityError):
        _export(made, name, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("branch", ["hot-swap", "pooled"])
@pytest.mark.parametrize("name", ["LoRA, untied", "tokens, tied"])
def test_graphs_with_slots_refuse_tables_by_name(name: str, branch: Any, made: Made, tmp_path: Path) -> None:
    base, adapter = made(name)
    with pytest.raises(AdapterError, match="changes a table of tokens") as caught:
        export_onnx(base, {"own": adapter}, output=tmp_path / "out", merge=False, branch=branch, quantization="none")
    assert caught.value.details["tensor"] == "model.embed_tokens"
    assert "--branch --fixed or --merge" in str(caught.value.details["remedy"])
    assert not (tmp_path / "out").exists()


class _Lookup(nn.Module):
    """A table, and a layer that reads what was looked up."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.table, self.layer = nn.Embedding(37, 12), nn.Linear(12, 5)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """(batch, length) to (batch, length, 5)."""
        return self.layer(self.table(tokens))  # type: ignore[no-any-return]


@pytest.mark.parametrize("branch", [None, "fixed"])
@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["table", "layer"]},
        {"target_modules": ["layer"], "trainable_token_indices": {"table": [36, 4]}},
    ],
    ids=["LoRA", "tokens"],
)
def test_tables_of_plain_modules(config: dict[str, Any], branch: Any, tmp_path: Path) -> None:
    adapted = peft_model(_Lookup(), config | {"task_type": None})
    adapted.save_pretrained(tmp_path / "own")
    tokens = torch.tensor([[36, 4, 1, 0, 9], [2, 4, 36, 8, 8]])
    options: dict[str, Any] = {"merge": branch is None, "branch": branch}
    result = export_onnx(
        _Lookup(), tmp_path / "own", output=tmp_path / "out", example_inputs={"tokens": tokens}, **options
    )
    assert result.report is not None
    assert result.report.passed
    assert verify_module(tmp_path / "out", _Lookup(), tmp_path / "own", example_inputs={"tokens": tokens}).passed
    found = torch.from_numpy(OnnxSession(tmp_path / "out").run({"tokens": tokens.numpy()})["output"])
    with torch.no_grad():
        torch.testing.assert_close(found, adapted(tokens), rtol=1e-4, atol=1e-4)
        assert (found - _Lookup()(tokens)).abs().max() > 0.1


def test_the_base_is_left_as_it_is(made: Made, tmp_path: Path) -> None:
    base, _ = made("LoRA, tied")
    before = load_file(base / "model.safetensors")
    _export(made, "LoRA, tied", tmp_path / "out")
    after = load_file(base / "model.safetensors")
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert TIED["tie_word_embeddings"] == tiny_model("llama", **TIED).config.tie_word_embeddings
