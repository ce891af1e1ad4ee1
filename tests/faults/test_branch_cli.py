"""Mistakes with adapters as branches, through the command line: one code, one message, nothing changed on disk."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lora_deploy.adapter import write_adapter
from lora_deploy.export import commit, export_onnx
from lora_deploy.export import write as write_module
from tests.commands import Command, Ended, assert_one_message, tree
from tests.conftest import random_adapter, tiny_model
from tests.export.conftest import BranchFactory
from tests.faults.conftest import Place
from tests.run.conftest import byte_tokenizer


def _branch(place: Place, *more: object, adapter: bool = True, quantization: str = "nf4") -> Ended:
    asked = ["--model", place.base, "--output", place.output, "--quiet", "--quantization", quantization, "--no-verify"]
    own = ["--adapter", f"one={place.adapter}"] if adapter else []
    return place.command("export", *asked, *own, *more)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ([], ["--merge or --branch"]),
        (["--merge", "--branch"], ["--merge or --branch"]),
        (["--branch", "--fixed", "--pool"], ["--fixed --pool"]),
        (["--merge", "--fixed"], ["go with --branch"]),
        (["--merge", "--pool"], ["go with --branch"]),
        (["--merge", "--expand"], ["go with --branch"]),
        (["--merge", "--adapter-precision", "int8"], ["go with --branch", "--adapter-precision"]),
        (["--branch", "--pool", "--adapter-precision", "int8"], ["stored in int8", "--pool", "--fixed"]),
        (["--branch", "--adapter-precision", "int4"], ["no such precision of adapters", "int4", "int8"]),
        (["--branch", "--adapter", "one=ADAPTER"], ["same name", "one", "NAME=DIR"]),
        (["--branch", "--adapter", "a b=ADAPTER"], ["cannot be the name", "a b"]),
        (["--branch", "--adapter", "../b=ADAPTER"], ["cannot be the name", "../b"]),
        (["--branch", "--adapter", "=ADAPTER"], ["cannot be the name"]),
        (["--branch", "--fixed", "--adapter", "two=ADAPTER"], ["of one adapter", "one, two"]),
        (["--merge", "--adapter", "two=ADAPTER"], ["only one adapter can be merged", "one, two"]),
        (["--branch", "--precision", "int4"], ["needs --merge", "int4", "nf4"]),
        (["--branch", "--precision", "fp4"], ["not trained in this precision", "fp4", "nf4, int8"]),
        (["--merge", "--precision", "nf4"], ["needs --branch", "nf4"]),
        (["--branch", "--precision", "bf16"], ["bf16", "cpu"]),
        (["--branch", "--compute-dtype", "bf16"], ["bf16", "cpu"]),
        (["--branch", "--compute-dtype", "fp8"], ["no such type", "fp8"]),
        (["--branch", "--precision", "fp32", "--compute-dtype", "fp16"], ["--compute-dtype"]),
        (["--branch", "--precision", "int8", "--expand"], ["own codes", "--expand"]),
        (["--branch", "--precision", "int8", "--accuracy-level", "1"], ["no such accuracy level", "1", "0 or 4"]),
        (["--branch", "--precision", "int8", "--accuracy-level", "-4"], ["no such accuracy level", "-4"]),
        (["--branch", "--accuracy-level", "4"], ["accuracy level", "nf4", "--precision int8"]),
        (["--branch", "--precision", "fp32", "--accuracy-level", "4"], ["accuracy level", "fp32"]),
        (["--merge", "--accuracy-level", "4"], ["accuracy level", "fp32"]),
        (["--branch", "--provider", "tpu"], ["no such provider"]),
    ],
    ids=str,
)
def test_options_that_cannot_be_end_with_two(flags: list[str], named: list[str], place: Place) -> None:
    before = tree(place.root)
    asked = [flag.replace("ADAPTER", str(place.adapter)) for flag in flags]
    assert_one_message(_branch(place, *asked), 2, *named)
    assert tree(place.root) == before


@pytest.mark.parametrize(
    ("flags", "quantization", "named"),
    [
        (["--pool"], "nf4", ["a pool needs adapters", "--adapter"]),
        (["--fixed"], "nf4", ["of one adapter", "none"]),
        (["--expand"], "none", ["own codes"]),
        (["--precision", "int8"], "none", ["not trained in this precision", "fp32"]),
        (["--expand", "--accuracy-level", "4"], "int8", ["accuracy level", "--expand"]),
    ],
    ids=str,
)
def test_what_needs_an_adapter_or_codes_says_so(
    flags: list[str], quantization: str, named: list[str], place: Place
) -> None:
    before = tree(place.root)
    assert_one_message(_branch(place, "--branch", *flags, adapter=False, quantization=quantization), 2, *named)
    assert tree(place.root) == before


@pytest.mark.parametrize("flags", [[], ["--pool"]], ids=str)
def test_an_adapter_that_trained_parameters_whole_has_no_slot(flags: list[str], place: Place) -> None:
    shutil.rmtree(place.adapter)
    write_adapter(random_adapter(tiny_model("llama"), modules_to_save=["lm_head"]), place.adapter)
    before = tree(place.root)
    ended = _branch(place, "--branch", *flags)
    assert_one_message(ended, 3, "trains parameters", "lm_head", place.adapter, "--branch --fixed")
    assert tree(place.root) == before
    assert _branch(place, "--branch", "--fixed").code == 0


def test_an_adapter_that_is_not_there_is_named(place: Place) -> None:
    before = tree(place.root)
    gone = place.root / "gone"
    assert_one_message(_branch(place, "--branch", "--adapter", f"two={gone}"), 3, "not a directory", gone)
    assert tree(place.root) == before


def test_an_export_that_exists_is_kept_or_replaced_with_its_adapters(place: Place) -> None:
    assert _branch(place, "--branch").code == 0
    before = tree(place.root)
    assert_one_message(_branch(place, "--branch"), 5, "the output exists", "an export", "--overwrite")
    assert tree(place.root) == before
    assert _branch(place, "--branch", "--overwrite").code == 0
    assert tree(place.root) == before
    # What is left is what a new directory would hold.
    ended = _branch(place, "--branch", "--overwrite", "--adapter", f"two={place.adapter}", adapter=False)
    assert ended.code == 0, ended.err
    assert [file.name for file in (place.output / "adapters").iterdir()] == ["two.onnx_adapter"]
    assert _branch(place, "--merge", "--overwrite").code == 0
    assert not (place.output / "adapters").exists()


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt(), 130), (OSError(28, "No space left"), 5)], ids=str)
def test_work_that_is_broken_off_while_adapters_are_written_changes_nothing(
    error: BaseException, code: int, overwrite: bool, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    if overwrite:
        assert _branch(place, "--merge").code == 0
    before = tree(place.root)
    real: Callable[..., Path] = write_module.write_onnx_adapter

    def broken(adapter: Any, manifest: Any, directory: Path, name: str) -> Path:
        if name == "two":
            from lora_deploy.errors import OutputError

            raise error if code == 130 else OutputError("the adapter could not be written", file=directory)
        return real(adapter, manifest, directory, name)

    monkeypatch.setattr(write_module, "write_onnx_adapter", broken)
    more = ["--overwrite"] if overwrite else []
    assert_one_message(_branch(place, "--branch", "--adapter", f"two={place.adapter}", *more), code)
    assert tree(place.root) == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_commit_that_fails_takes_its_adapters_back(
    overwrite: bool, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    if overwrite:
        assert _branch(place, "--merge").code == 0
    before = tree(place.root)
    real = Path.replace

    def replace(self: Path, target: Path) -> Path:
        if self.name == "model.onnx":
            raise OSError(28, "No space left on device")
        return real(self, target)

    monkeypatch.setattr(commit, "can_rename", lambda output: False)
    monkeypatch.setattr(Path, "replace", replace)
    assert_one_message(_branch(place, "--branch", *(["--overwrite"] if overwrite else [])), 5, "could not be written")
    assert tree(place.root) == before


@pytest.fixture
def talking(place: Place, tmp_path: Path) -> Path:
    """A hot-swap export with a tokenizer and the adapters "one" and "two"."""
    base = tmp_path / "talking"
    tiny_model("llama", vocab_size=260).save_pretrained(base)
    byte_tokenizer().save_pretrained(base)
    places: dict[str, str | Path] = {"one": tmp_path / "one", "two": tmp_path / "two"}
    for seed, directory in enumerate(places.values()):
        write_adapter(random_adapter(tiny_model("llama", vocab_size=260), seed=seed), Path(directory))
    return export_onnx(base, places, output=place.output, merge=False, quantization="nf4", verify=False).output


@pytest.mark.parametrize(
    ("flags", "code", "named"),
    [
        (["--adapter", "three"], 2, ["no such adapter", "three", "one, two"]),
        (["--adapter", "one=0.5", "--adapter", "three=0.5"], 2, ["no such adapter", "three"]),
        (["--adapter", "one", "--adapter", "two"], 2, ["needs a weight", "one"]),
        (["--adapter", "one=0.5", "--adapter", "two"], 2, ["needs a weight", "two"]),
        (["--adapter", "one="], 2, ["needs a weight", "one="]),
        (["--adapter", "one=much"], 2, ["needs a weight", "one=much"]),
        (["--adapter", "one=nan"], 2, ["finite weights"]),
        (["--adapter", "one=inf", "--adapter", "two=1"], 2, ["finite weights"]),
        (["--adapter", "one=1e39"], 2, ["too large"]),
        (["--adapter", "one=0.5", "--adapter", "one=0.5"], 2, ["named twice", "one"]),
        (["--weights", "magic"], 2, ["cannot run this way", "magic", "stored, expand, native"]),
        (["--provider", "tpu"], 2, ["does not have this provider"]),
    ],
    ids=str,
)
def test_mistakes_when_it_runs(flags: list[str], code: int, named: list[str], talking: Path, command: Command) -> None:
    before = tree(talking)
    assert_one_message(command("run", talking, "--prompt", "Hi", "--max-new-tokens", "2", *flags), code, *named)
    assert tree(talking) == before


def test_a_damaged_adapter_is_bad_input_when_it_runs(talking: Path, command: Command) -> None:
    file = talking / "adapters" / "one.onnx_adapter"
    file.write_bytes(file.read_bytes()[:-100])
    ended = command("run", talking, "--prompt", "Hi", "--adapter", "one")
    assert_one_message(ended, 3, "cannot be read", file, "adapter convert")
    assert command("run", talking, "--prompt", "Hi", "--adapter", "two", "--quiet").code == 0


def test_json_is_all_of_stdout(talking: Path, place: Place, command: Command, tmp_path: Path) -> None:
    answers = []
    for flags in ([], ["--adapter", "one"], ["--adapter", "one=0.3", "--adapter", "two=0.7"], ["--weights", "expand"]):
        ended = command("run", talking, "--prompt", "Hi", "--max-new-tokens", "8", "--json", *flags)
        assert ended.code == 0, ended.err
        answers.append(json.loads(ended.out)["text"])
    assert len(set(answers)) > 1
    assert answers[0] == answers[3]
    ended = command("adapter", "convert", tmp_path / "one", "--export", talking, "--name", "new", "--json")
    assert json.loads(ended.out)["file"] == str(talking / "adapters" / "new.onnx_adapter")
    for adapter in (tmp_path / "one", talking / "adapters" / "new.onnx_adapter"):
        described = json.loads(command("adapter", "inspect", adapter, "--json").out)
        assert described["updates"]
        assert described["file"] == str(adapter)
    ended = command("export", "--model", place.base, "--adapter", f"one={place.adapter}", "--branch", "--json",
                    "--quantization", "nf4", "--output", tmp_path / "other")  # fmt: skip
    printed = json.loads(ended.out)
    assert printed["parity"]["passed"] is True
    assert printed["parity"]["codes"]["exact"] is True


def test_mistakes_in_converting(talking: Path, place: Place, command: Command, branch_export: BranchFactory) -> None:
    before = tree(place.root)
    asked = ("adapter", "convert", place.adapter, "--export")
    assert_one_message(command(*asked, talking, "--name", "../x"), 2, "cannot be the name", "../x")
    assert_one_message(command(*asked, talking, "--name", ""), 2, "cannot be the name")
    assert_one_message(command(*asked, talking, "--name", "one"), 5, "of this name", "--overwrite")
    assert_one_message(command(*asked, place.root), 3, "no exported model")
    assert_one_message(command("adapter", "convert", place.root / "x", "--export", talking), 3, place.root / "x")
    assert_one_message(command("adapter", "inspect", place.root / "x"), 3, place.root / "x")
    for branch in (None, "fixed", "pooled"):
        export = branch_export("llama", "nf4", branch)
        assert_one_message(command(*asked, export.output), 2, "takes no adapters", branch or "merged")
    assert tree(place.root) == before


@pytest.mark.parametrize(
    "names", [(), ("train",), ("export",), ("verify",), ("run",), ("demo",), ("adapter",), ("adapter", "convert"),
              ("adapter", "inspect")], ids=" ".join
)  # fmt: skip
def test_every_command_has_its_help(names: tuple[str, ...], command: Command) -> None:
    ended = command(*names, "--help")
    assert ended.code == 0
    assert ended.err == ""
    assert "Usage" in ended.out
    if names == ():
        assert " adapter " in ended.out


@pytest.mark.parametrize("names", [(), ("export",), ("run",), ("adapter", "convert")], ids=" ".join)
def test_help_imports_nothing_heavy(names: tuple[str, ...]) -> None:
    program = (
        "import sys\n"
        "from lora_deploy.cli import main\n"
        "try:\n    main()\n"
        "except SystemExit as ended:\n    assert not ended.code, ended.code\n"
        "print(sorted({'torch', 'onnxruntime', 'transformers', 'onnx_ir', 'numpy'} & set(sys.modules)))\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program, *names, "--help"], capture_output=True, text=True, check=True
    )
    assert ended.stdout.splitlines()[-1] == "[]"
