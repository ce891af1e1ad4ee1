"""`lora-deploy bench`: what is measured of each kind of export, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lora_deploy.bench import Benchmark, BenchOptions, Measure, machine, run_benchmark
from lora_deploy.bench import bench as bench_module
from lora_deploy.bench.measure import measure
from lora_deploy.errors import LoraDeployError, UsageError
from lora_deploy.run import OnnxModel, OnnxSession
from tests.commands import Command, assert_one_message, command
from tests.export.conftest import (
    SHORT,
    BranchFactory,
    adapter_dir,
    branch_export,
    tiny_export,
)

__all__ = [
    "adapter_dir",
    "branch_export",
    "command",
    "tiny_export",
]

TWO = {"one": {"seed": 1}, "two": {"seed": 2}}
CONTEXT = SHORT["llama"]["max_position_embeddings"]
DECODER = {"open", "first_token", "prefill", "decode"}
MEMORY = {"peak_memory", "added_memory"}
# By kind: more than a merged decoder has.
MORE = {
    None: set[str](),
    "fixed": set[str](),
    "hot-swap": {"adapter_load", "decode_bare", "decode_switching", "adapter_switch"},
    "pooled": {"pooled", "singly"},
}


@pytest.fixture
def exported(branch_export: BranchFactory) -> Callable[[str | None], Path]:
    """An export of each kind; those that can choose have two adapters."""

    def make(kind: str | None) -> Path:
        return branch_export(branch=kind, adapters=TWO if kind in ("hot-swap", "pooled") else None).output

    return make


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples without a process of their own, which takes a second to start."""
    monkeypatch.setattr(bench_module, "_sample", measure)


@pytest.mark.parametrize("kind", MORE)
@pytest.mark.usefixtures("in_this_process")
def test_every_kind_of_export_is_measured(kind: str | None, exported: Callable[[str | None], Path]) -> None:
    found = run_benchmark(BenchOptions(directory=exported(kind), prompt_tokens=5, tokens=3, runs=2))
    assert (found.task, found.branch, found.precision) == ("causal-lm", kind, "fp32" if kind is None else "nf4")
    assert found.adapters == (["one", "two"] if kind in ("hot-swap", "pooled") else [])
    assert (found.prompt_tokens, found.tokens, found.runs) == (5, 3, 2)
    assert found.measures.keys() == DECODER | MORE[kind] | MEMORY
    rows = 2 if kind == "pooled" else 1
    counts = {"first_token": 5, "prefill": 5, "pooled": 3 * rows, "singly": 3 * rows}
    for name, one in found.measures.items():
        assert len(one.values) == 2
        assert 0 <= one.lower <= one.median <= one.upper
        assert one.median > 0 or name == "added_memory"
        if one.unit == "tokens/s":
            assert one.count == counts.get(name, 3)
            for value, seconds in zip(one.values, one.seconds, strict=True):
                assert value * seconds == pytest.approx(one.count)
        elif one.unit == "s":
            assert one.values == one.seconds
    assert found.measures["peak_memory"].median > found.measures["added_memory"].median
    assert found.machine["cores"] >= 1  # type: ignore[operator]
    assert {"python", "onnxruntime", "lora-deploy", "numpy"} <= found.versions.keys()


def test_the_measured_loop_decodes_what_the_model_does(
    exported: Callable[[str | None], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tokens that are fed to the session are those that greedy generation gives, with the adapter."""
    fed: list[list[int]] = []
    forward = OnnxSession.forward

    def recording(self: OnnxSession, input_ids: np.ndarray, *arguments: object, **options: object) -> object:
        fed.append(input_ids[0].tolist())
        return forward(self, input_ids, *arguments, **options)  # type: ignore[arg-type]

    output = exported("hot-swap")
    monkeypatch.setattr(OnnxSession, "forward", recording)
    measure(BenchOptions(directory=output, prompt_tokens=5, tokens=4, adapters=("two",)))
    monkeypatch.setattr(OnnxSession, "forward", forward)
    prompt, after = fed[1], [tokens[0] for tokens in fed[2:7]]
    assert len(prompt) == 5
    monkeypatch.setattr("lora_deploy.run.generate.load_tokenizer", lambda directory: None)
    monkeypatch.setattr("lora_deploy.run.generate.find_eos_token_ids", lambda directory, tokenizer: set())
    model = OnnxModel(output, "two")
    assert list(model.generate_tokens(prompt, max_new_tokens=5)) == after
    model.set_adapter(None)
    assert list(model.generate_tokens(prompt, max_new_tokens=5)) != after


def test_the_command_measures_in_other_processes_and_writes_all_of_it(
    exported: Callable[[str | None], Path], tmp_path: Path, command: Command
) -> None:
    file = tmp_path / "bench.json"
    asked = ["bench", exported("hot-swap"), "--runs", 1, "--prompt-tokens", 4, "--tokens", 2, "--threads", 1]
    ended = command(*asked, "--adapter", "two", "--json", file)
    assert ended.code == 0, ended.err
    found = Benchmark.model_validate_json(file.read_text(encoding="utf-8"))
    assert (found.adapters, found.threads, found.tokens) == (["two"], 1, 2)
    assert found.measures.keys() == DECODER | MORE["hot-swap"] | MEMORY
    for text in ("hot-swap, nf4, cpu", "decoding 2", "tokens/s", "memory at its peak", "to the bare base's"):
        assert text in ended.out
    assert "…" not in ended.out


def test_json_may_go_to_the_screen_and_quiet_shows_nothing_else(
    exported: Callable[[str | None], Path], command: Command, in_this_process: None
) -> None:
    asked = ["bench", exported(None), "--runs", 1, "--quiet"]
    assert command(*asked) == (0, "", "")
    ended = command(*asked, "--json", "-")
    assert json.loads(ended.out)["measures"]["decode"]["unit"] == "tokens/s"
    assert ended.err == ""


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--runs", 0], "runs = 0"),
        (["--tokens", 0], "tokens = 0"),
        (["--threads", 0], "threads = 0"),
        (["--provider", "tpu"], "provider = 'tpu'"),
        (["--weights", "lifted"], "weights = 'lifted'"),
        (["--adapter", "a", "--adapter", "a"], "named twice"),
    ],
)
def test_bad_options_are_refused_before_anything_is_opened(options: list[object], named: str, command: Command) -> None:
    assert_one_message(command("bench", "nowhere", *options, "--quiet"), 2, named)


def test_an_error_of_the_other_process_is_the_commands_own(
    exported: Callable[[str | None], Path], command: Command, tmp_path: Path
) -> None:
    ended = command("bench", exported("hot-swap"), "--adapter", "three", "--quiet")
    assert_one_message(ended, 2, "no such adapter", "three", "one, two")
    assert_one_message(command("bench", tmp_path, "--quiet"), 3, tmp_path)


@pytest.mark.usefixtures("in_this_process")
def test_more_tokens_than_the_context_and_adapters_of_a_merged_export(
    exported: Callable[[str | None], Path], command: Command, tmp_path: Path
) -> None:
    output = exported(None)
    ended = command("bench", output, "--prompt-tokens", CONTEXT, "--quiet")
    assert_one_message(ended, 2, f"a prompt of {CONTEXT}", f"at most {CONTEXT - 1}")
    assert_one_message(command("bench", output, "--adapter", "one", "--quiet"), 2, "takes no adapters")
    ended = command("bench", output, "--runs", 1, "--quiet", "--json", tmp_path / "no" / "file.json")
    assert_one_message(ended, 5, "file.json")


def test_other_models_than_those_of_text_are_refused_before_they_are_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lora_deploy.bench.measure.exported_task", lambda directory: "seq2seq-lm")
    with pytest.raises(UsageError, match="only language models and classifiers"):
        measure(BenchOptions(directory=tmp_path))


@pytest.mark.parametrize(
    ("context", "asked", "expected"),
    [
        (None, {}, (128, 64)),
        (8192, {}, (128, 64)),
        (100, {}, (50, 49)),
        (20, {"prompt_tokens": 18}, (18, 1)),
        (20, {"tokens": 15}, (4, 15)),
        (3, {}, (1, 1)),
    ],
)
def test_lengths_that_are_left_open_fit_the_context(
    context: int | None, asked: dict[str, int], expected: tuple[int, int]
) -> None:
    assert BenchOptions(directory=Path(), **asked).lengths(context, decodes=True) == expected


def test_lengths_of_a_classifier_are_those_of_its_text() -> None:
    assert BenchOptions(directory=Path()).lengths(28, decodes=False) == (26, 0)
    with pytest.raises(UsageError, match="more tokens"):
        BenchOptions(directory=Path(), prompt_tokens=27).lengths(28, decodes=False)


def test_a_process_that_dies_is_an_error_and_not_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(LoraDeployError, match="ended early"):
        run_benchmark(BenchOptions(directory=Path("out")))


def test_median_and_quartiles_are_of_the_rates() -> None:
    found = Measure.of_seconds([1.0, 2.0, 4.0], "tokens/s", 8)
    assert found.values == [8, 4, 2]
    assert (found.lower, found.median, found.upper) == (3, 4, 6)
    assert found.format(found.lower, found.upper) == "3.0 to 6.0 tokens/s"
    assert Measure.of_seconds([0.0123], "s").format(0.0123) == "12.3 ms"
    assert Measure.of_bytes([2_500_000_000]).format(2.5e9) == "2,500 MB"


def test_memory_is_the_kernels_count_where_there_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peak, resident = machine.peak_memory(), machine.resident_memory()
    assert peak is not None
    assert resident is not None
    assert peak >= resident > 1e6
    monkeypatch.setattr(machine, "Path", lambda name: tmp_path / "nothing")
    assert machine.peak_memory() is None
    assert machine.describe_machine()["processor"]


def test_nothing_heavy_is_imported_to_measure() -> None:
    program = (
        "import sys; import lora_deploy.bench.child; "
        "print(sorted({'torch', 'transformers', 'mobius', 'bitsandbytes'} & sys.modules.keys()))"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "[]"
