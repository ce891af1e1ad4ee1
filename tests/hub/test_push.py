"""What goes to the hub: the files of an export that passed, or of an adapter, and a card that is theirs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import CommitOperationDelete, ModelCard

from lora_deploy.adapter import TrainingRecord, write_adapter
from lora_deploy.errors import CheckpointError, OutputError, ParityError, UsageError
from lora_deploy.export import export_onnx
from lora_deploy.export.onnx_adapter import convert_adapter
from lora_deploy.hub import push_to_hub
from lora_deploy.integrity import check_files
from lora_deploy.quantization import QuantizationScheme
from lora_deploy.verify.report import ParityReport
from tests.commands import Command, assert_one_message, command
from tests.conftest import CheckpointFactory, random_adapter, tiny_model
from tests.train.conftest import calls, tiny_base, write_jsonl

__all__ = ["command", "tiny_base"]


class Hub:
    """A hub that keeps what it is sent.

    Args:
        card: The README.md that is there already.
        licence: Of the base, as its own card has it.
    """

    def __init__(self, card: Path | None = None, licence: str | None = None) -> None:
        self.card, self.licence = card, licence
        self.files: dict[str, bytes] = {}
        self.made: dict[str, Any] = {}
        self.known = {"HuggingFaceTB/SmolLM2", "them/base", "gpt2"}

    def create_repo(self, repo_id: str, **options: Any) -> None:
        """Note it."""
        self.made = {"repo_id": repo_id, **options}

    def file_exists(self, repo_id: str, name: str) -> bool:
        """Whether there is a card."""
        return self.card is not None

    def hf_hub_download(self, repo_id: str, name: str) -> str:
        """The card."""
        return str(self.card)

    def model_info(self, base: str) -> Any:
        """The base's card."""
        if base not in self.known:
            raise ValueError("there is no such model")
        return SimpleNamespace(card_data={"license": self.licence} if self.licence else None)

    def list_repo_files(self, repo_id: str) -> list[str]:
        """What there is."""
        return list(self.files)

    def create_commit(self, repo_id: str, operations: list[Any], **_: Any) -> Any:
        """Keep the files."""
        for operation in operations:
            if isinstance(operation, CommitOperationDelete):
                del self.files[operation.path_in_repo]
                continue
            with operation.as_file() as content:
                self.files[operation.path_in_repo] = content.read()
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")


def card_of(hub: Hub) -> tuple[dict[str, Any], str]:
    """The metadata and the text of the card that was sent, as the hub reads it."""
    card = ModelCard(hub.files["README.md"].decode())
    return card.data.to_dict(), card.text


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """An adapter that does something."""
    write_adapter(random_adapter(tiny_model("llama"), target_modules=["q_proj", "v_proj"]), tmp_path / "json")
    return tmp_path / "json"


@pytest.fixture
def export(adapter: Path, checkpoint_dir: CheckpointFactory, tmp_path: Path) -> Callable[..., Path]:
    """`export(**options)`: of the adapter on a base in nf4."""

    def make(**options: Any) -> Path:
        return export_onnx(
            checkpoint_dir("llama"), adapter, output=tmp_path / "out", quantization="nf4", **options
        ).output

    return make


def test_an_export_with_its_card(export: Callable[..., Path], tmp_path: Path) -> None:
    out = export(merge=False)
    for foreign in ("notes.txt", "private.onnx", "model-0000.onnx.data", "adapters/z.onnx_adapter.partial"):
        (out / foreign).write_text("not of the export")
    hub = Hub(licence="apache-2.0")
    pushed = push_to_hub(out, "me/reminders", base_model="HuggingFaceTB/SmolLM2", api=hub)  # type: ignore[arg-type]
    data = next(out.glob("*.data")).name
    assert set(hub.files) >= {
        "model.onnx",
        data,
        "parity.json",
        "config.json",
        "adapters/json.onnx_adapter",
        "README.md",
    }
    assert not {name for name in hub.files if b"not of the export" in hub.files[name]}
    assert set(pushed.files) == set(hub.files)
    assert hub.files[data] == (out / data).read_bytes()
    assert hub.made == {"repo_id": "me/reminders", "private": False, "exist_ok": True}
    assert not pushed.warnings
    metadata, text = card_of(hub)
    assert metadata == {
        "base_model": "HuggingFaceTB/SmolLM2",
        "library_name": "onnx",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "lora-deploy", "onnx", "onnxruntime"],
    }
    report = json.loads((out / "parity.json").read_text())
    for case in report["cases"]:
        label = f"{case['adapter']}: {case['name']}" if case["adapter"] else case["name"]
        assert f"| {label} | {case['export']['max_abs']:.1e} |" in text
    assert "# reminders" in text
    assert 'lora-deploy run model --adapter json --prompt "..."' in text
    assert "Trained on the base in nf4, block 64, double quantization." in text
    assert not [name for name, content in hub.files.items() if str(tmp_path).encode() in content]


def test_the_card_of_a_merged_export_without_a_known_base(export: Callable[..., Path]) -> None:
    hub = Hub()
    pushed = push_to_hub(export(), "me/merged", api=hub)  # type: ignore[arg-type]
    metadata, text = card_of(hub)
    assert "base_model" not in metadata
    assert "license" not in metadata
    assert len(pushed.warnings) == 2
    assert 'OnnxModel("model")' in text
    assert "merged into its dequantized weights" in text


def test_the_licence_is_that_of_the_card_beside_the_base(
    adapter: Path, own_checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    base = own_checkpoint("llama")
    (base / "README.md").write_text("---\nlicense: mit\n---\n# Base\n")
    out = export_onnx(base, adapter, output=tmp_path / "out", quantization="none").output
    hub = Hub(licence="other")
    push_to_hub(out, "me/merged", base_model="them/base", api=hub)  # type: ignore[arg-type]
    assert card_of(hub)[0]["license"] == "mit"
    push_to_hub(out, "me/merged", license="gpl-3.0", api=hub)  # type: ignore[arg-type]
    assert card_of(hub)[0]["license"] == "gpl-3.0"


def test_a_card_that_somebody_wrote_stays(export: Callable[..., Path], tmp_path: Path) -> None:
    out = export()
    ours = Hub()
    push_to_hub(out, "me/merged", api=ours)  # type: ignore[arg-type]
    (tmp_path / "card.md").write_bytes(ours.files["README.md"])
    again = Hub(card=tmp_path / "card.md")
    push_to_hub(out, "me/merged", api=again)  # type: ignore[arg-type]
    assert "README.md" in again.files
    (tmp_path / "card.md").write_text("# My own words")
    theirs = Hub(card=tmp_path / "card.md")
    pushed = push_to_hub(out, "me/merged", api=theirs)  # type: ignore[arg-type]
    assert "README.md" not in theirs.files
    assert any("left as it is" in warning for warning in pushed.warnings)


def test_what_did_not_pass_is_not_pushed(export: Callable[..., Path], tmp_path: Path) -> None:
    hub = Hub()
    unproved = export(verify=False)
    with pytest.raises(ParityError, match="never compared"):
        push_to_hub(unproved, "me/x", api=hub)  # type: ignore[arg-type]
    shutil.rmtree(unproved)
    out = export()
    failed = json.loads((out / "parity.json").read_text())
    (out / "parity.json").write_text(json.dumps(failed | {"passed": False}))
    with pytest.raises(CheckpointError, match=r"parity\.json"):
        push_to_hub(out, "me/x", api=hub)  # type: ignore[arg-type]
    shutil.rmtree(out)
    out = export()
    data = next(out.glob("*.data"))
    content = bytearray(data.read_bytes())
    content[100] ^= 1
    data.write_bytes(content)
    with pytest.raises(CheckpointError):
        push_to_hub(out, "me/x", api=hub)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="neither an export nor an adapter"):
        push_to_hub(tmp_path, "me/x", api=hub)  # type: ignore[arg-type]
    assert not hub.made
    assert not hub.files


def test_a_report_of_a_failed_check_is_no_pass(export: Callable[..., Path]) -> None:
    out = export()
    report = ParityReport.model_validate_json((out / "parity.json").read_text())
    report.model_copy(update={"passed": False}).save(out)
    with pytest.raises(ParityError, match="does not compute"):
        push_to_hub(out, "me/x", api=Hub())  # type: ignore[arg-type]


def test_an_adapter_without_the_places_of_this_machine(adapter: Path, tmp_path: Path) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "base")
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    record = TrainingRecord(
        base_model=str(tmp_path / "base"),
        quantization=QuantizationScheme(method="nf4"),
        base_sha256="0" * 64,
        data=str(tmp_path / "secret.jsonl"),
    )
    record.save(adapter)
    (adapter / "checkpoints").mkdir()
    (adapter / "checkpoints" / "state").write_text("large")
    hub = Hub(licence="apache-2.0")
    push_to_hub(adapter, "me/json", base_model="them/base", private=True, api=hub)  # type: ignore[arg-type]
    assert set(hub.files) == {"adapter_config.json", "adapter_model.safetensors", "lora_deploy.json", "README.md"}
    assert not [name for name, content in hub.files.items() if str(tmp_path).encode() in content]
    assert json.loads(hub.files["adapter_config.json"])["base_model_name_or_path"] == "them/base"
    assert json.loads(hub.files["lora_deploy.json"])["quantization"]["method"] == "nf4"
    assert hub.made["private"] is True
    metadata, text = card_of(hub)
    assert (metadata["library_name"], metadata["base_model"]) == ("peft", "them/base")
    assert "rank 4 (alpha 10)" in text
    for name, content in hub.files.items():
        (tmp_path / "fetched").mkdir(exist_ok=True)
        (tmp_path / "fetched" / name).write_bytes(content)
    assert TrainingRecord.load(tmp_path / "fetched") is not None


def test_a_hub_that_refuses(export: Callable[..., Path]) -> None:
    class Refusing(Hub):
        def create_commit(self, *given: Any, **named: Any) -> Any:
            raise ConnectionError("no route to host\nmore")

    with pytest.raises(OutputError, match="the hub did not take it") as refused:
        push_to_hub(export(), "me/x", api=Refusing())  # type: ignore[arg-type]
    assert "no route to host" in str(refused.value)
    assert "more" not in refused.value.details["found"]


def test_the_commands(
    adapter: Path, checkpoint_dir: CheckpointFactory, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub(licence="mit")
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: hub)
    asked = ["export", "--model", checkpoint_dir("llama"), "--adapter", adapter, "--quantization", "nf4", "--merge"]
    asked += ["--output", tmp_path / "out", "--push-to-hub", "me/merged"]
    assert_one_message(command(*asked, "--no-verify"), 2, "--push-to-hub")
    assert not (tmp_path / "out").exists()
    ended = command(*asked)
    assert ended.code == 0, ended.err
    assert "https://hub/me/merged/commit/1" in ended.out
    assert "--base-model" in ended.out
    assert "model.onnx" in hub.files
    hub.files.clear()
    ended = command("push", adapter, "me/json", "--base-model", "them/base", "--private", "--json")
    assert ended.code == 0, ended.err
    assert json.loads(ended.out)["url"] == "https://hub/me/json/commit/1"
    assert hub.made["private"] is True
    (tmp_path / "out" / "parity.json").unlink()
    assert_one_message(command("push", tmp_path / "out", "me/merged", "--quiet"), 4, "never compared")


def test_training_pushes_what_it_wrote(
    tiny_base: Callable[..., str], tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub()
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: hub)
    data = write_jsonl(tmp_path / "data.jsonl", calls())
    asked = ["train", "--model", tiny_base(), "--data", data, "--output", tmp_path / "adapter", "--max-steps", "1"]
    ended = command(*asked, "--device", "cpu", "--push-to-hub", "me/trained", "--quiet")
    assert ended.code == 0, ended.err
    assert "adapter_model.safetensors" in hub.files
    assert str(tmp_path).encode() not in hub.files["lora_deploy.json"]


def test_what_an_earlier_push_left_goes(export: Callable[..., Path], tmp_path: Path) -> None:
    out = export(merge=False)
    hub = Hub()
    push_to_hub(out, "me/x", api=hub)  # type: ignore[arg-type]
    hub.files["notes.md"] = b"of the repository's owner"
    before = set(hub.files)
    shutil.rmtree(out)
    push_to_hub(export(precision="int8"), "me/x", api=hub)  # type: ignore[arg-type]
    assert "adapters/json.onnx_adapter" in before
    assert "adapters/json.onnx_adapter" not in hub.files
    assert "notes.md" in hub.files
    fetched = tmp_path / "fetched"
    for name, content in hub.files.items():
        (fetched / name).parent.mkdir(parents=True, exist_ok=True)
        (fetched / name).write_bytes(content)
    assert check_files(fetched)


def test_an_adapter_that_was_converted_after_the_check_is_left_out(export: Callable[..., Path], tmp_path: Path) -> None:
    out = export(merge=False)
    write_adapter(random_adapter(tiny_model("llama"), target_modules=["q_proj"], seed=9), tmp_path / "late")
    convert_adapter(tmp_path / "late", out, "late")
    hub = Hub()
    pushed = push_to_hub(out, "me/x", api=hub)  # type: ignore[arg-type]
    assert "adapters/late.onnx_adapter" not in hub.files
    assert any("late" in warning for warning in pushed.warnings)
    assert "late" not in hub.files["README.md"].decode()


@pytest.mark.parametrize(("place", "known"), [("models/my-secret", False), ("gpt2", True), ("them/base", True)])
def test_only_what_the_hub_knows_is_a_name(place: str, known: bool, adapter: Path) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": place}))
    hub = Hub()
    push_to_hub(adapter, "me/x", api=hub)  # type: ignore[arg-type]
    assert (place in hub.files["README.md"].decode()) == known
    assert json.loads(hub.files["adapter_config.json"])["base_model_name_or_path"] == (place if known else None)
    assert "--quantization WHAT_THE_BASE_WAS" in hub.files["README.md"].decode()
