"""`lora-deploy verify` of exports with a branch: which adapters, where they are, and what must fail."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import NamedTuple

import onnx_ir as ir
import pytest

from lora_deploy.errors import InputError, UsageError
from lora_deploy.export import export_onnx
from lora_deploy.export.onnx_adapter import convert_adapter
from lora_deploy.integrity import find_adapters
from lora_deploy.run.adapter_files import read_tensors
from lora_deploy.verify import verify
from tests.commands import Command, assert_one_message
from tests.export.conftest import BranchExport, BranchFactory
from tests.run.test_adapter_files import write
from tests.sealed import reseal

ADAPTERS = {"one": {}, "two": {"r": 8, "seed": 3}}


class Made(NamedTuple):
    """An export and its adapters, all of which the test may damage."""

    output: Path
    adapters: dict[str, Path]


def _own(export: BranchExport, root: Path) -> Made:
    """The export made again from copies of its adapters, which the test may move."""
    places = {name: Path(shutil.copytree(path, root / name)) for name, path in export.adapters.items()}
    metadata = ir.load(export.output / "model.onnx").metadata_props
    output = root / "out"
    export_onnx(
        export.base_dir,
        places,
        output=output,
        merge=False,
        branch=metadata["lora_deploy.branch"],  # type: ignore[arg-type]
        quantization=export.scheme.method,
        verify=False,
    )
    return Made(output, places)


@pytest.fixture
def made(branch_export: BranchFactory, tmp_path: Path) -> Made:
    return _own(branch_export("llama", "nf4", adapters=ADAPTERS), tmp_path)


def _report(output: Path) -> dict[str, object]:
    report: dict[str, object] = json.loads((output / "parity.json").read_text())
    return report


def test_a_hot_swap_export_is_checked_bare_and_with_every_adapter(made: Made, command: Command) -> None:
    ended = command("verify", made.output, "--json")
    assert ended.code == 0, ended.err
    report = json.loads(ended.out)
    written = _report(made.output)
    assert {name: written[name] for name in report} == report
    assert set(written) - set(report) == {"model_sha256", "report_sha256"}
    assert [case["adapter"] for case in report["cases"]] == ["no adapter"] * 6 + ["one"] * 6 + ["two"] * 6
    assert all(case["passed"] for case in report["cases"])
    assert [case["control"] is None for case in report["cases"]] == [True] * 6 + [False] * 12
    assert report["control_failed"] is True
    assert report["codes"]["layers"] == 14
    assert report["codes"]["exact"] is True
    assert report["codes"]["bytes"] > 0


@pytest.mark.parametrize(("branch", "adapters"), [("fixed", {"own": {}}), ("pooled", ADAPTERS)])
def test_other_branches_are_checked(
    branch: str, adapters: dict[str, dict[str, int]], branch_export: BranchFactory, tmp_path: Path, command: Command
) -> None:
    made = _own(branch_export("llama", "nf4", branch, adapters=adapters), tmp_path)
    ended = command("verify", made.output)
    assert ended.code == 0, ended.err
    assert "bit for bit" in ended.out
    names = list(dict.fromkeys(case["adapter"] for case in _report(made.output)["cases"]))  # type: ignore[attr-defined]
    assert names == ([""] if branch == "fixed" else ["no adapter", "one", "two", "mixed 1"])
    if branch == "pooled":
        assert "mixed 1, worst of 2" in ended.out
        mixed = verify(made.output, adapter=["two"]).cases[-1]
        assert (mixed.adapter, mixed.passed) == ("mixed 1", True)


@pytest.mark.parametrize("asked", [["one"], ["two"], ["two", "one"]], ids=str)
def test_only_the_adapters_that_are_named_are_checked(asked: list[str], made: Made, command: Command) -> None:
    options = [part for name in asked for part in ("--adapter", name)]
    ended = command("verify", made.output, "--json", *options)
    assert ended.code == 0, ended.err
    names = list(dict.fromkeys(case["adapter"] for case in json.loads(ended.out)["cases"]))
    assert names == ["no adapter", *asked]


def test_an_adapter_that_has_moved_is_named_with_the_option_that_helps(
    made: Made, branch_export: BranchFactory, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    new = made.adapters["two"].rename(made.output.parent / "moved")
    monkeypatch.setenv("XDG_CACHE_HOME", str(made.output.parent / "another machine"))
    one, base = made.adapters["one"], branch_export("llama", "nf4", adapters=ADAPTERS).base_dir
    ended = command("verify", made.output, "--quiet")
    assert_one_message(ended, 2, "not known where the adapter", "one", "--adapter one=DIR")
    both = {"one": one, "two": new}
    with pytest.raises(UsageError, match="not known where the base") as caught:
        verify(made.output, adapter=both)
    assert "--model" in caught.value.details["remedy"]
    assert verify(made.output, model=base, adapter=both).passed
    assert command("verify", made.output, "--quiet").code == 0  # what was named is known now


def test_another_adapter_than_the_recorded_one_is_refused(made: Made, command: Command) -> None:
    other = made.adapters["two"]
    ended = command("verify", made.output, "--quiet", "--adapter", f"one={other}")
    assert_one_message(ended, 3, "not the adapter", other, "sha256", "--adapter")


@pytest.mark.parametrize("asked", ["three", "three=DIR", "=DIR"])
def test_a_name_that_the_export_does_not_know_is_an_error_of_usage(asked: str, made: Made, command: Command) -> None:
    ended = command("verify", made.output, "--quiet", "--adapter", asked.replace("DIR", str(made.adapters["one"])))
    assert_one_message(ended, 2, "one, two")
    with pytest.raises(UsageError):
        verify(made.output, adapter={"three": made.adapters["one"]})


def test_a_directory_alone_says_which_adapter_only_where_there_is_one(
    made: Made, branch_export: BranchFactory, tmp_path: Path, command: Command
) -> None:
    ended = command("verify", made.output, "--quiet", "--adapter", made.adapters["one"])
    assert_one_message(ended, 2, "which adapter", "NAME=DIR", "one, two")
    single = _own(branch_export("llama", "nf4"), tmp_path / "single")
    assert command("verify", single.output, "--quiet", "--adapter", single.adapters["own"]).code == 0


def test_an_adapter_that_was_converted_later_is_checked_where_it_was_trained(
    branch_export: BranchFactory, made: Made, command: Command, tmp_path: Path
) -> None:
    export = branch_export("llama", "nf4", adapters={})
    output = Path(shutil.copytree(export.output, tmp_path / "bare"))
    assert command("verify", output, "--quiet").code == 0
    assert json.loads((output / "parity.json").read_text())["control_failed"] is None
    convert_adapter(made.adapters["two"], output, "later")
    assert_one_message(command("verify", output, "--quiet", "--adapter", "later"), 2, "later", "--adapter later=DIR")
    ended = command("verify", output, "--json", "--adapter", f"later={made.adapters['two']}")
    assert ended.code == 0
    assert {case["adapter"] for case in json.loads(ended.out)["cases"]} == {"no adapter", "later"}
    # Another directory than it was converted from: not the function that is deployed.
    ended = command("verify", output, "--quiet", "--adapter", f"later={made.adapters['one']}")
    assert_one_message(ended, 4, "does not compute what was trained", "later")


def test_a_file_that_was_replaced_by_another_adapters_fails(made: Made, command: Command) -> None:
    """It fits in every way: names, shapes, base, seal, and here the recorded hash. Only the logits tell."""
    files = find_adapters(made.output)
    shutil.copyfile(files["two"], files["one"])
    assert_one_message(
        command("verify", made.output, "--quiet"), 3, "converted anew", files["one"], "--adapter one=DIR"
    )
    reseal(made.output)
    ended = command("verify", made.output, "--quiet")
    assert_one_message(ended, 4, "does not compute what was trained", "one: prefill")
    assert "FAIL two" not in ended.err
    assert _report(made.output)["passed"] is False


def test_an_update_of_nothing_in_one_slot_fails(made: Made, command: Command) -> None:
    file = find_adapters(made.output)["one"]
    version, tensors = read_tensors(file)
    name = next(key for key in tensors if "layers/1" in key and key.endswith("down_proj/lora_B"))
    tensors[name] = tensors[name] * 0
    write(file, tensors, version)
    reseal(made.output)
    assert_one_message(command("verify", made.output, "--quiet", "--adapter", "one"), 4, "one: prefill")
    assert command("verify", made.output, "--quiet", "--adapter", "two").code == 0


@pytest.mark.parametrize("damage", ["garbage", "gone"])
def test_a_damaged_adapter_file_is_bad_input(damage: str, made: Made, command: Command) -> None:
    file = find_adapters(made.output)["one"]
    file.write_bytes(b"nothing")
    if damage == "gone":
        file.unlink()
    assert_one_message(command("verify", made.output, "--quiet"), 3, "one.onnx_adapter", "adapter convert")
    with pytest.raises(InputError):
        verify(made.output, adapter=["one"])


def test_an_adapter_without_effect_proves_nothing(
    branch_export: BranchFactory, tmp_path: Path, command: Command
) -> None:
    made = _own(branch_export("llama", "nf4", adapters={"idle": {"scale": 1e-6}}), tmp_path)
    assert_one_message(command("verify", made.output, "--quiet"), 4, "proves nothing", "next to nothing")


@pytest.mark.parametrize(("method", "options", "exact"), [("int8", {}, True), ("nf4", {"precision": "int8"}, False)])
def test_codes_that_were_transcoded_are_called_so(
    method: str, options: dict[str, str], exact: bool, branch_export: BranchFactory
) -> None:
    export = branch_export("llama", method, **options)
    report = verify(export.output)
    assert report.passed
    assert report.codes is not None
    assert report.codes.exact is exact
    assert report.precision == "fp32"
    assert (report.deployment is None) is exact


def test_what_was_not_checked_is_said_and_the_full_report_is_kept(branch_export: BranchFactory, tmp_path: Path) -> None:
    made = branch_export(adapters={"a": {}, "b": {"seed": 3}})
    directory = Path(shutil.copytree(made.output, tmp_path / "out"))
    full = verify(directory)
    assert full.passed
    before = (directory / "parity.json").read_bytes()
    shutil.copyfile(directory / "adapters" / "a.onnx_adapter", directory / "adapters" / "later.onnx_adapter")
    partial = verify(directory, adapter=["b"])
    assert any("not checked: a, later" in note for note in partial.notes)
    assert (directory / "parity.json").read_bytes() == before
    with pytest.raises(UsageError, match="not said which adapter"):
        verify(directory, adapter=[])
    with pytest.raises(UsageError) as caught:
        verify(directory, adapter=["zzz"])
    assert "a, b, later" in caught.value.details["expected"]
