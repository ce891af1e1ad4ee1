"""SmolLM2-135M-Instruct on its own 4-bit codes with adapters beside them, against the trained model and the merge."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import numpy as np
import onnx_ir as ir
import pytest
import torch

from lora_deploy.adapter import LoraAdapter, LoraUpdate, apply_adapter, read_adapter, write_adapter
from lora_deploy.config import LoraConfig
from lora_deploy.errors import UsageError
from lora_deploy.manifest import Manifest
from lora_deploy.native import load_kernels
from lora_deploy.quantization import QuantizationScheme
from lora_deploy.quantization.base import TrainingBase
from lora_deploy.run import OnnxModel
from lora_deploy.run.adapters import Adapters
from lora_deploy.run.session import OnnxSession, Weights
from lora_deploy.verify.batches import Batch, make_batches
from lora_deploy.verify.metrics import compare_logits
from lora_deploy.verify.parity import run_export, run_twin
from lora_deploy.verify.reference import load_twin
from tests.real.conftest import NEW_TOKENS, Trained, genai_tokens, run_command, twin_tokens
from tests.web.conftest import Opened
from tests.web.test_browser import ask

pytestmark = pytest.mark.real

_RANKS = (4, 8, 16, 32, 64)
# Some of these exports take over 1 GB of disk.
_KEPT = 3
Export = Callable[..., Path]


@pytest.fixture(scope="module")
def export(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Export]:
    """`export(*options, adapters={})`: an export of the base on NF4 by the command line; the last few are kept."""
    made: dict[object, Path] = {}

    def make(*options: str, adapters: Mapping[str, Path] | None = None) -> Path:
        named = {"trained": trained.adapter} if adapters is None else dict(adapters)
        key = (options, *sorted(named))
        directory = made.pop(key, None)
        if directory is None:
            while len(made) >= _KEPT:
                shutil.rmtree(made.pop(next(iter(made))))
            directory = tmp_path_factory.mktemp("branch") / "out"
            given = [part for name, place in named.items() for part in ("--adapter", f"{name}={place}")]
            rest = ("--quantization", "nf4", "--output", directory, "--quiet")
            run_command("export", "--model", trained.base, *given, *options, *rest)
        made[key] = directory
        return directory

    yield make
    for directory in made.values():
        shutil.rmtree(directory)


@pytest.fixture(scope="module")
def random_adapters(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Random adapters of several ranks on all linear layers, whose effect is of the order of a trained one's."""
    return _write_random(trained.base, tmp_path_factory.mktemp("random"), _RANKS)


def _write_random(base: Path, directory: Path, ranks: Sequence[int]) -> dict[str, Path]:
    generator = torch.Generator().manual_seed(ranks[0])
    linears = TrainingBase(base).linears
    made = {}
    for rank in ranks:
        updates = {
            name: LoraUpdate(
                torch.randn(rank, layer.shape[1], generator=generator) * 0.05,
                torch.randn(layer.shape[0], rank, generator=generator) * 0.05 / rank**0.5,
                10 / rank,
            )
            for name, layer in linears.items()
        }
        made[f"rank{rank}"] = directory / f"rank{rank}"
        write_adapter(LoraAdapter(LoraConfig(r=rank, lora_alpha=10), updates), made[f"rank{rank}"])
    return made


@pytest.fixture(scope="module")
def base(trained: Trained) -> TrainingBase:
    """The training base."""
    return TrainingBase(trained.base, QuantizationScheme(method="nf4"))


def _logits(session: OnnxSession, batches: Sequence[Batch], inputs: Mapping[str, Any]) -> list[torch.Tensor]:
    return [run_export(session, batch, inputs) for batch in batches]


def _distance(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor], batches: Sequence[Batch]) -> float:
    """Largest difference of a logit, padding left out."""
    pairs = zip(found, expected, batches, strict=True)
    return max(float(((a - b).abs().amax(-1) * batch.attention_mask).max()) for a, b, batch in pairs)


def test_the_codes_are_the_bases_own_and_the_function_is_the_trained_one(export: Export) -> None:
    report = json.loads((export("--branch") / "parity.json").read_text())
    assert report["passed"]
    assert report["codes"]["exact"]
    assert report["codes"]["layers"] == 210
    assert {case["adapter"] for case in report["cases"]} == {"no adapter", "trained"}
    for case in report["cases"]:
        assert case["export"]["max_abs"] <= 1e-3
        if case["adapter"] == "trained":
            assert case["control"]["max_abs"] > 10 * 1e-3
            assert case["control"]["mean_kl"] > 10 * 1e-6


def test_every_byte_of_the_codes_is_what_bitsandbytes_made_of_the_checkpoint(
    export: Export, base: TrainingBase
) -> None:
    model = ir.load(export("--branch") / "model.onnx")
    seen = 0
    for weight in Manifest.load(export("--branch")).coded:
        codes = model.graph.initializers[weight.codes].const_value.numpy()  # type: ignore[union-attr]
        for module in weight.modules:
            dense = base.tensor(f"{module.name}.weight").float()
            expected, _ = bnb.quantize_4bit(dense, blocksize=64, quant_type="nf4", compress_statistics=True)
            flat = expected.reshape(-1).numpy()
            assert np.array_equal(codes[: flat.size], flat), module.name
            codes = codes[flat.size :]
            seen += 1
    assert seen == 210


@pytest.mark.slow  # tests/export/test_branch.py says so of tiny models
def test_branch_and_merge_are_the_same_function(export: Export, base: TrainingBase) -> None:
    batches = make_batches(base)
    merged = _logits(OnnxSession(export("--merge")), batches, {})
    alone = _logits(OnnxSession(export("--branch")), batches, {})
    assert _distance(alone, merged, batches) > 10 * 1e-3
    for options in (
        ("--branch", "--fixed", "--precision", "fp32", "--no-verify"),
        ("--branch",),
        ("--branch", "--expand", "--no-verify"),
    ):
        session = OnnxSession(export(*options))
        inputs = Adapters(session, export(*options)).inputs(None if "--fixed" in options else "trained")
        assert _distance(_logits(session, batches, inputs), merged, batches) <= 1e-3


def test_the_fixed_branch_of_thirty_layers_has_few_nodes(export: Export) -> None:
    assert (
        len(list(ir.load(export("--branch", "--fixed", "--precision", "fp32", "--no-verify") / "model.onnx").graph))
        <= 791
    )


@pytest.mark.slow  # tests/export/test_slots.py says so of tiny models
def test_without_an_adapter_the_slots_change_nothing(
    export: Export, base: TrainingBase, random_adapters: dict[str, Path]
) -> None:
    """Then five adapters of different ranks in turn, each against its own twin, and nothing again."""
    batches = make_batches(base)
    bare = _logits(OnnxSession(export("--merge", adapters={})), batches, {})
    directory = export("--branch", "--precision", "fp32", "--no-verify", adapters=random_adapters)
    session = OnnxSession(directory)
    adapters = Adapters(session, directory)
    assert all(torch.equal(a, b) for a, b in zip(_logits(session, batches, {}), bare, strict=True))
    for name, place in random_adapters.items():
        trained = run_twin(base, read_adapter(place), batches)
        assert _distance(bare, trained, batches) > 10 * 1e-3
        assert _distance(_logits(session, batches, adapters.inputs(name)), trained, batches) <= 1e-3
    assert all(torch.equal(a, b) for a, b in zip(_logits(session, batches, {}), bare, strict=True))


@pytest.mark.slow  # tests/run/test_batch.py says so of tiny models
def test_a_pooled_run_of_eight_rows_is_eight_runs(
    export: Export, base: TrainingBase, trained: Trained, random_adapters: dict[str, Path], tmp_path: Path
) -> None:
    named = {"trained": trained.adapter, **random_adapters, **_write_random(trained.base, tmp_path, (3, 12))}
    pooled = export("--branch", "--pool", "--precision", "fp32", "--no-verify", adapters=named)
    slots = export("--branch", "--precision", "fp32", "--no-verify", adapters=named)
    rows = make_batches(base)[1]
    eight = Batch("eight", rows.input_ids.repeat(2, 1), rows.attention_mask.repeat(2, 1), rows.decoded)
    together, apart = OnnxSession(pooled), OnnxSession(slots)
    found = run_export(together, eight, Adapters(together, pooled).row_inputs(list(named)))
    adapters = Adapters(apart, slots)
    for row, name in enumerate(named):
        one = Batch("one", eight.input_ids[row : row + 1], eight.attention_mask[row : row + 1], eight.decoded)
        expected = run_export(apart, one, adapters.inputs(name))
        assert _distance([found[row : row + 1]], [expected], [one]) <= 1e-4
        assert _distance([found[row - 1 : row] if row else found[-1:]], [expected], [one]) > 1e-2


@pytest.mark.slow  # test_merged.py says so of merged weights, tests/run of adapters
def test_pytorch_onnxruntime_and_genai_give_the_same_tokens(
    trained: Trained, export: Export, base: TrainingBase, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = export("--branch")
    twin: Any = load_twin(base)
    model = OnnxModel(directory)
    encoded = [model.encode(prompt) for prompt in trained.prompts]
    bare = [twin_tokens(twin, ids) for ids in encoded]
    apply_adapter(twin, read_adapter(trained.adapter)).eval()
    expected = [twin_tokens(twin, ids) for ids in encoded]
    assert all(answer != before for answer, before in zip(expected, bare, strict=True))
    file = directory / "adapters" / "trained.onnx_adapter"
    assert genai_tokens(directory, encoded, file) == expected
    assert genai_tokens(directory, encoded) == bare
    for weights in _ways():
        model = OnnxModel(directory, "trained", weights=weights)
        assert [list(model.generate_tokens(ids, max_new_tokens=NEW_TOKENS)) for ids in encoded] == expected
        model.set_adapter(None)
        assert [list(model.generate_tokens(ids, max_new_tokens=NEW_TOKENS)) for ids in encoded] == bare
    run_command("adapter", "convert", trained.adapter, "--export", directory, "--name", "later", "--quiet")
    capsys.readouterr()
    prompt = ("--prompt", trained.prompts[0], "--max-new-tokens", NEW_TOKENS)
    run_command("run", directory, "--adapter", "later", *prompt, "--weights", "expand")
    assert capsys.readouterr().out == model.tokenizer.decode(expected[0], skip_special_tokens=True) + "\n"


def _ways() -> list[Weights]:
    try:
        load_kernels()
    except UsageError:
        return ["expand"]
    return ["expand", "native"]


@pytest.mark.slow  # tests/export/test_int8_branch.py says so of tiny models
@pytest.mark.parametrize("fixed", [True, False], ids=["fixed", "hot-swap"])
def test_an_adapter_in_int8_is_within_a_millionth_of_the_trained_function(
    fixed: bool, trained: Trained, export: Export, base: TrainingBase
) -> None:
    options = ("--branch", "--fixed") if fixed else ("--branch",)
    directory = export(*options, "--adapter-precision", "int8")
    report = json.loads((directory / "parity.json").read_text())
    assert report["passed"]
    assert report["control_failed"]
    batches = make_batches(base)
    session = OnnxSession(directory)
    found = _logits(session, batches, Adapters(session, directory).inputs(None if fixed else "trained"))
    expected, alone = run_twin(base, read_adapter(trained.adapter), batches), run_twin(base, None, batches)
    for batch, ours, theirs, bare in zip(batches, found, expected, alone, strict=True):
        assert compare_logits(theirs, ours, batch.attention_mask, 2e-3).mean_kl <= 1e-6
        assert compare_logits(theirs, bare, batch.attention_mask, 2e-3).mean_kl > 1e-3


@pytest.mark.parametrize("rank", [8, 16])
def test_a_fixed_branch_in_int8_takes_less_than_five_bits_a_weight(
    rank: int, export: Export, random_adapters: dict[str, Path]
) -> None:
    """Codes, float32 absmax, A and B, on all linear layers: 4.5 bits are the base's."""
    named = {f"rank{rank}": random_adapters[f"rank{rank}"]}
    directory = export("--branch", "--fixed", "--adapter-precision", "int8", "--no-verify", adapters=named)
    manifest, initializers = Manifest.load(directory), ir.load(directory / "model.onnx").graph.initializers
    names = [name for weight in manifest.coded for name in (weight.codes, weight.scales)]
    names += [name for slot in manifest.slots for name in slot.input_names]
    size = sum(initializers[name].const_value.nbytes for name in names)  # type: ignore[union-attr]
    weights = sum(weight.shape[0] * weight.shape[1] for weight in manifest.coded)
    assert 4.5 < size * 8 / weights <= 5.0


@pytest.mark.slow  # tests/web says so of tiny models
def test_the_browser_gives_the_same_tokens(trained: Trained, export: Export, opened: Opened, tmp_path: Path) -> None:
    directory = export("--branch")
    run_command("web", directory, tmp_path / "page", "--quiet")
    model = OnnxModel(directory)
    answers = {}
    with opened(tmp_path / "page") as page:
        for name in (None, "trained", None):
            model.set_adapter(name)
            ids = model.encode(trained.prompts[0])
            answers[name] = list(model.generate_tokens(ids, max_new_tokens=NEW_TOKENS))
            assert ask(page, trained.prompts[0], name, NEW_TOKENS) == answers[name]
        # More tokens than the page runs at once.
        long = " ".join(trained.prompts * 7)
        assert len(model.encode(long)) > 300
        assert ask(page, long, None, 5) == list(model.generate_tokens(model.encode(long), max_new_tokens=5))
    assert answers[None] != answers["trained"]
