"""`lora-deploy verify`: files, provenance and function of an export that is there already."""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import onnx_ir as ir
import pytest

from lora_deploy.errors import OutputError
from lora_deploy.export import export_onnx
from lora_deploy.export.commit import locked
from lora_deploy.verify import verify
from tests.commands import Command, assert_one_message, tree
from tests.conftest import CheckpointFactory
from tests.export.conftest import ExportFactory
from tests.sealed import save_graph

# `lora_deploy.verify.verify` is the function of that name.
verify_module = importlib.import_module("lora_deploy.verify.verify")


class Made(NamedTuple):
    """An export and what it was made from, all of which the test may damage."""

    output: Path
    base: Path
    adapter: Path


@pytest.fixture
def made(checkpoint_dir: CheckpointFactory, adapter_dir: Callable[..., Path], tmp_path: Path) -> Made:
    base = Path(shutil.copytree(checkpoint_dir("llama"), tmp_path / "base"))
    adapter = Path(shutil.copytree(adapter_dir("llama", modules_to_save=["lm_head"]), tmp_path / "adapter"))
    export_onnx(base, adapter, output=tmp_path / "out", quantization="nf4", verify=False)
    return Made(tmp_path / "out", base, adapter)


def _data(output: Path) -> Path:
    (data,) = output.glob("*.data")
    return data


def test_a_fresh_export_passes_and_the_report_is_written_anew(made: Made, command: Command) -> None:
    assert not (made.output / "parity.json").exists()
    assert command("verify", made.output, "--quiet") == (0, "", "")
    report = json.loads((made.output / "parity.json").read_text())
    assert report["passed"] is True
    assert report["control_failed"] is True
    assert len(report["cases"]) == 6
    before = (made.output / "parity.json").read_bytes()
    ended = command("verify", made.output, "--json")
    assert ended.code == 0
    seals = {name: report[name] for name in ("model_sha256", "report_sha256")}
    assert json.loads(ended.out) | seals == report
    assert (made.output / "parity.json").read_bytes() == before


@pytest.mark.parametrize("method", ["none", "fp4", "int8"])
def test_the_quantization_of_the_export_is_the_one_that_is_checked(method: str, tiny_export: ExportFactory) -> None:
    _, _, result = tiny_export("gpt2", method)
    assert result.report is not None
    assert verify(result.output) == result.report


@pytest.mark.parametrize("place", [0, 0.5, 1])
def test_a_flipped_bit_in_the_weights_is_found(place: float, made: Made, command: Command) -> None:
    data = _data(made.output)
    content = bytearray(data.read_bytes())
    content[int(place * (len(content) - 1))] ^= 1
    data.write_bytes(content)
    before = tree(made.output)
    assert_one_message(command("verify", made.output, "--quiet"), 3, "damaged", data, "export again")
    assert tree(made.output) == before


def test_truncated_weights_are_found(made: Made, command: Command) -> None:
    data = _data(made.output)
    data.write_bytes(data.read_bytes()[:-1])
    assert_one_message(command("verify", made.output, "--quiet"), 3, "damaged", data)


def test_missing_weights_are_named(made: Made, command: Command) -> None:
    data = _data(made.output)
    data.unlink()
    assert_one_message(command("verify", made.output, "--quiet"), 3, "missing", data, "export again")


def test_a_directory_without_a_model_is_no_export(tmp_path: Path, command: Command) -> None:
    assert_one_message(command("verify", tmp_path, "--quiet"), 3, "no exported model", tmp_path / "model.onnx")
    assert_one_message(command("verify", tmp_path / "none", "--quiet"), 3, "no exported model")


def test_a_damaged_graph_is_named(made: Made, command: Command) -> None:
    file = made.output / "model.onnx"
    file.write_bytes(b"\xff" * 100)
    assert_one_message(command("verify", made.output, "--quiet"), 3, "damaged", file)


def test_a_model_of_someone_else_is_not_ours(made: Made, command: Command) -> None:
    file = made.output / "model.onnx"
    model = ir.load(file)
    model.metadata_props.clear()
    ir.save(model, file)
    assert_one_message(command("verify", made.output, "--quiet"), 3, "not exported by lora-deploy", file)


def test_a_graph_that_computes_something_else_fails_although_its_weights_are_whole(
    made: Made, command: Command
) -> None:
    """The hash of the data cannot see it; the logits can."""
    file = made.output / "model.onnx"
    model = ir.load(file)
    node = next(node for node in model.graph if node.op_type == "RMSNormalization")
    node.attributes["epsilon"] = ir.AttrFloat32("epsilon", 0.1)
    ir.save(model, file)
    assert_one_message(command("verify", made.output, "--quiet"), 3, "the graph of the export is damaged", file)
    save_graph(model, made.output)
    ended = command("verify", made.output, "--quiet")
    assert_one_message(ended, 4, "does not compute what was trained", made.output)
    assert json.loads((made.output / "parity.json").read_text())["passed"] is False


@pytest.mark.parametrize("what", ["model", "adapter"])
def test_what_has_moved_is_named_with_the_option_that_helps(
    what: str, made: Made, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = {"model": made.base, "adapter": made.adapter}
    places[what] = places[what].rename(made.base.with_name("moved"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(made.output.parent / "another machine"))
    named = [text for name, place in places.items() if name != what for text in (f"--{name}", place)]
    ended = command("verify", made.output, "--quiet", *named)
    assert_one_message(ended, 2, "not known where", "sha256", f"--{what}")
    assert command("verify", made.output, "--quiet", *named, f"--{what}", places[what]).code == 0
    assert command("verify", made.output, "--quiet").code == 0  # what was named is known now


def test_another_base_of_the_same_shapes_is_refused(
    made: Made, command: Command, checkpoint_dir: CheckpointFactory
) -> None:
    other = checkpoint_dir("llama", seed=5)
    assert_one_message(
        command("verify", made.output, "--quiet", "--model", other), 3, "not the base", other, "sha256", "--model"
    )


def test_another_adapter_of_the_same_shapes_is_refused(
    made: Made, command: Command, adapter_dir: Callable[..., Path]
) -> None:
    other = adapter_dir("llama", modules_to_save=["lm_head"], seed=9)
    ended = command("verify", made.output, "--quiet", "--adapter", other)
    assert_one_message(ended, 3, "not the adapter", other, "sha256", "--adapter")


def _scale(made: Made) -> None:
    file = made.adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"lora_alpha": 11}))


def _change_head(made: Made) -> None:
    from safetensors.torch import load_file, save_file

    file = made.adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    (head,) = (name for name in tensors if "lm_head" in name)
    tensors[head] = tensors[head] + 1
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("change", [_scale, _change_head])
def test_an_adapter_with_the_same_updates_but_another_effect_is_refused(
    change: Callable[[Made], None], made: Made, command: Command
) -> None:
    """Other scaling, or another head that was trained with it: not "the export is wrong", but "the adapter is"."""
    change(made)
    assert_one_message(command("verify", made.output, "--quiet"), 3, "not the adapter", made.adapter)


def test_a_name_or_a_note_in_the_adapters_configuration_changes_nothing(made: Made, command: Command) -> None:
    file = made.adapter / "adapter_config.json"
    changes = {"base_model_name_or_path": "elsewhere", "lora_dropout": 0.3, "task_type": None}
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    assert command("verify", made.output, "--quiet").code == 0


def test_an_unknown_provider_is_an_error_of_usage(made: Made, command: Command) -> None:
    assert_one_message(command("verify", made.output, "--quiet", "--provider", "tpu"), 2, "no such provider", "tpu")


def test_a_provider_that_is_not_here_is_noted_not_hidden(made: Made) -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("onnxruntime has CUDA here")
    report = verify(made.output, provider="cuda")
    assert report.passed
    assert report.provider == "cpu"
    assert "no cuda provider" in report.notes[0]


def test_a_verdict_is_never_put_beside_another_export(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    checked = verify_module.check_parity

    def slow(*given: Any, **options: Any) -> Any:
        report = checked(*given, **options)
        export_onnx(made.base, None, output=made.output, quantization="nf4", verify=False, overwrite=True)
        return report

    monkeypatch.setattr(verify_module, "check_parity", slow)
    with pytest.raises(OutputError, match="replaced while it was checked"):
        verify(made.output)
    assert not (made.output / "parity.json").exists()
    assert not (made.output / "report.html").exists()
    monkeypatch.setattr(verify_module, "check_parity", checked)
    with locked(made.output), pytest.raises(OutputError, match="another lora-deploy is writing there"):
        verify(made.output)


@pytest.mark.parametrize("name", ["comparison_page", "parity_page", "parity_figures"])
def test_pages_can_be_imported_first(name: str) -> None:
    subprocess.run([sys.executable, "-c", f"import lora_deploy.pages.{name}"], check=True)
