"""The precisions side by side: every row complete, in the order that they must have, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lora_deploy.compare import compare_precisions
from lora_deploy.compare.candidates import Candidate, default_candidates
from lora_deploy.compare.report import Comparison
from lora_deploy.errors import OutputError, UsageError
from lora_deploy.requantize import Requantization
from tests.commands import Command
from tests.conftest import CheckpointFactory
from tests.export.conftest import SHORT


def _rounded(bits: int) -> Candidate:
    asked = Requantization(bits, rows=0)  # type: ignore[arg-type]
    return Candidate(f"int{bits}", (), {"merge": True, "precision": f"int{bits}", "requantization": asked})


CANDIDATES = [
    Candidate("fp32", ("--merge",), {"merge": True, "precision": "fp32"}),
    _rounded(8),
    _rounded(4),
    Candidate("impossible", (), {"merge": True, "precision": "bf16"}),
]


@pytest.fixture(scope="module")
def compared(
    checkpoint_dir: CheckpointFactory,
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Comparison, Path, Path, Path]:
    """A comparison, where it was written, the base and the adapter."""
    output = tmp_path_factory.mktemp("compared") / "out"
    base, adapter = checkpoint_dir("llama", **SHORT["llama"]), request.getfixturevalue("adapter_dir")("llama")
    found = compare_precisions(base, adapter, output=output, quantization="nf4", candidates=CANDIDATES)
    return found, output, base, adapter


def test_every_row_is_complete_and_a_failure_is_a_row(compared: tuple[Comparison, Path, Path, Path]) -> None:
    found = compared[0]
    assert [row.name for row in found.rows] == ["fp32", "int8", "int4", "impossible"]
    assert found.rows[3].error is not None
    assert "bf16" in found.rows[3].error
    for row in found.measured:
        assert row.megabytes is not None
        assert row.megabytes > 0
        assert row.tokens_per_second is not None
        assert row.tokens_per_second > 0
        assert row.relative_speed is not None
        assert row.relative_speed > 0
        assert row.texts
        assert "lora-deploy export" in row.command
    assert len(found.measured) == 3
    assert found.rows[0].relative_speed == 1.0


def test_what_keeps_more_is_nearer_and_the_base_alone_is_furthest(
    compared: tuple[Comparison, Path, Path, Path],
) -> None:
    found = compared[0]
    kl = {row.name: found.kl(row) for row in found.measured}
    assert kl["fp32"] < 1e-6 < kl["int8"] < kl["int4"] < found.kl(found.base_alone)
    size = {row.name: row.megabytes or 0 for row in found.measured}
    assert size["int4"] < size["int8"] < size["fp32"]
    assert found.best()["most faithful"].name == "fp32"
    assert found.best()["smallest"].name == "int4"
    assert found.trained.texts[0].kl == 0
    assert "fp32" in found.summary()


def test_numbers_and_picture_are_written_and_nothing_else(compared: tuple[Comparison, Path, Path, Path]) -> None:
    found, output, *_ = compared
    assert sorted(file.name for file in output.iterdir()) == ["comparison.json", "comparison.png", "report.html"]
    assert Comparison.model_validate_json((output / "comparison.json").read_text()) == found
    assert (output / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert [file.name for file in output.parent.iterdir()] == ["out"]


def test_an_older_comparison_is_replaced_only_if_that_is_said(compared: tuple[Comparison, Path, Path, Path]) -> None:
    _, output, base, adapter = compared
    before = (output / "comparison.json").read_bytes()
    with pytest.raises(OutputError, match="the output exists"):
        compare_precisions(base, adapter, output=output, quantization="nf4", candidates=CANDIDATES[:1])
    assert (output / "comparison.json").read_bytes() == before


def test_a_provider_that_is_not_here_is_refused(compared: tuple[Comparison, Path, Path, Path], tmp_path: Path) -> None:
    *_, base, adapter = compared
    with pytest.raises(UsageError, match="does not have this provider here"):
        compare_precisions(base, adapter, output=tmp_path / "out", quantization="nf4", provider="webgpu")


def test_what_is_tried_depends_on_the_base() -> None:
    names = {method: [one.name for one in default_candidates(method)] for method in ("none", "nf4", "int8")}
    assert names["nf4"][:4] == ["merged int4", "merged int4, 5.25 bits", "merged int4, correction 16", "merged int8"]
    assert "branch nf4, int8 adapter" in names["nf4"]
    assert "branch fp32" in names["none"]
    assert not any("nf4" in name for name in (*names["none"], *names["int8"]))


@pytest.mark.parametrize("options", [["--merge"], ["--precision", "int4"], ["--recipe", "merged-int4-cpu"]])
def test_how_to_export_cannot_be_said(options: list[str], command: Command, tmp_path: Path) -> None:
    arguments = ["export", "--compare", "--model", "m", "--adapter", "a", "--output", str(tmp_path / "out"), *options]
    result = command(*arguments)
    assert result.code == 2, result
    assert "--compare" in result.err
    assert not (tmp_path / "out").exists()


def test_the_command_prints_the_numbers(
    compared: tuple[Comparison, Path, Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    command: Command,
    tmp_path: Path,
) -> None:
    *_, base, adapter = compared
    monkeypatch.setattr("lora_deploy.compare.compare.default_candidates", lambda *_: CANDIDATES[:1])
    arguments = ["--model", str(base), "--adapter", str(adapter), "--quantization", "nf4", "--json"]
    result = command("export", "--compare", *arguments, "--output", str(tmp_path / "out"))
    assert result.code == 0, result
    assert json.loads(result.out)["rows"][0]["name"] == "fp32"
