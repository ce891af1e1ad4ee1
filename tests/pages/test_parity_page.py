"""`report.html`: its numbers are those of `parity.json`, its bytes the same twice, and it runs and loads nothing."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lora_deploy.adapter import write_adapter
from lora_deploy.errors import CheckpointError
from lora_deploy.export import export_onnx
from lora_deploy.integrity import check_files
from lora_deploy.manifest import read_metadata
from lora_deploy.pages import parity_page as pages
from lora_deploy.pages.parity_page import parity_page, save_report
from lora_deploy.requantize import Requantization
from lora_deploy.train.progress import LOG_NAME, write_log
from lora_deploy.verify import ParityReport, verify
from lora_deploy.verify.deployment_report import DeploymentResult
from lora_deploy.verify.report import CaseResult, LayerErrors, Metrics
from lora_deploy.verify.texts import TextResult
from tests.commands import Command
from tests.conftest import CheckpointFactory, random_adapter, tiny_model
from tests.export.conftest import SHORT
from tests.pages.html import Page, assert_alone

HOSTILE = "\"><script>alert(1)</script><img src=x onerror=alert(2)>'&{{7*7}}</style></title>"


@pytest.fixture(scope="module")
def export(checkpoint_dir: CheckpointFactory, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`export(precision)`: of a tiny adapter that has the log of its training beside it; made once."""
    root, made = tmp_path_factory.mktemp("pages"), {}
    write_adapter(random_adapter(tiny_model("llama", **SHORT["llama"])), root / "reminders")
    write_log(root / "reminders" / LOG_NAME, [{"step": step, "loss": 2.0 / step} for step in range(1, 20)])

    def make(precision: str = "fp32") -> Path:
        if precision not in made:
            asked = {"requantization": Requantization(4, rows=0)} if precision == "int4" else {}
            base = checkpoint_dir("llama", **SHORT["llama"])
            options: Any = {"output": root / precision, "quantization": "nf4", "precision": precision, **asked}
            made[precision] = export_onnx(base, root / "reminders", **options).output
        return made[precision]

    return make


def _numbers(values: Any) -> Iterator[float]:
    if isinstance(values, dict):
        values = list(values.values())
    if isinstance(values, list):
        for value in values:
            yield from _numbers(value)
    elif type(values) in (int, float):
        yield float(values)


@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_every_number_is_one_of_the_report(precision: str, export: Callable[..., Path]) -> None:
    directory = export(precision)
    report = json.loads((directory / "parity.json").read_text())
    page = assert_alone((directory / "report.html").read_bytes())
    known = set(_numbers(report))
    assert page.numbers
    assert set(page.numbers) <= known
    for case in report["cases"]:
        for which in ("export", "control"):
            assert {case[which]["mean_kl"], case[which]["top1"]} <= set(page.numbers)
    for text in (report["deployment"] or {"texts": []})["texts"]:
        assert {text["kl"], text["top1"], text["loss"], text["base_kl"]} <= set(page.numbers)


def test_every_layer_is_drawn_with_its_error(export: Callable[..., Path]) -> None:
    directory = export("int4")
    report = json.loads((directory / "parity.json").read_text())
    titles = Page((directory / "report.html").read_bytes()).titles
    (layers,) = report["layers"]
    assert len(layers["export"]) == len(layers["control"]) == len(report["deployment"]["cache_errors"]) == 2
    for number in range(2):
        assert (
            f"layer {number}, onnxruntime, against the deployed weights in PyTorch: {layers['export'][number]:.2e}"
            in titles
        )
        assert f"layer {number}, the base without its adapter: {layers['control'][number]:.2e}" in titles
        assert any(
            f"layer {number}, rounding" in title and f"{report['deployment']['cache_errors'][number]:.2e}" in title
            for title in titles
        )
    for name, share in report["deployment"]["layers"].items():
        kind, number = name.rpartition("layers.")[2].partition(".")[2], name.split(".")[2]
        assert f"{kind}, layer {number}: {share:.1%} of the update survives" in titles


def test_the_training_is_drawn_where_there_is_a_log(export: Callable[..., Path], tmp_path: Path) -> None:
    directory = export()
    page = Page((directory / "report.html").read_bytes())
    assert "Training" in page.texts
    assert "reminders, step 4: training loss 0.5" in page.titles
    report = ParityReport.model_validate_json((directory / "parity.json").read_text())
    assert "Training" not in Page(parity_page(directory, report, {"reminders": tmp_path})).texts


def test_the_same_bytes_twice_and_no_place_of_this_machine(export: Callable[..., Path], tmp_path: Path) -> None:
    directory = export("int4")
    page = (directory / "report.html").read_bytes()
    assert str(directory.parent).encode() not in page
    assert str(Path.home()).encode() not in page
    copy = Path(shutil.copytree(directory, tmp_path / "elsewhere"))
    (copy / "report.html").unlink()
    verify(copy)
    assert (copy / "report.html").read_bytes() == page
    assert (copy / "parity.json").read_bytes() == (directory / "parity.json").read_bytes()


def test_what_fails_is_seen(export: Callable[..., Path]) -> None:
    """Numbers that are none, too."""
    directory = export()
    report = ParityReport.model_validate_json((directory / "parity.json").read_text())
    bad = report.cases[0].export.model_copy(update={"mean_kl": math.nan, "max_abs": math.inf, "top1": 0.0})
    cases = [report.cases[0].model_copy(update={"export": bad, "passed": False}), *report.cases[1:]]
    layers = [LayerErrors(export=[math.nan, math.inf], control=[0.0, 1.0])]
    page = Page(
        parity_page(directory, report.model_copy(update={"cases": cases, "passed": False, "layers": layers}), {})
    )
    assert any(text.startswith("Failed: prefill, right-padded: max abs inf, KL nan") for text in page.texts)
    assert "FAIL" in page.texts
    odd = [values for _, values in page.elements if "odd" in values.get("class", "").split()]
    assert len(odd) == 3
    assert not any("nan" in values.get(name, "") for _, values in page.elements for name in ("cx", "cy", "points"))


def test_hostile_names_are_words(export: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """In all that comes from files: the manifest and PEFT's configuration of a stranger, names, notes, texts."""
    directory = export("int4")
    report = ParityReport.model_validate_json((directory / "parity.json").read_text())
    assert report.deployment is not None
    case = report.cases[0].model_copy(update={"adapter": HOSTILE, "name": HOSTILE})
    text = report.deployment.texts[0].model_copy(update={"name": HOSTILE})
    deployment = report.deployment.model_copy(
        update={"texts": [text], "layers": {f"{HOSTILE}.1.{HOSTILE}": 0.5, HOSTILE: 1.0}}
    )
    changes = {"cases": [case], "deployment": deployment, "notes": [HOSTILE], "provider": HOSTILE, "passed": False}
    entries = read_metadata(directory) | {
        "lora_deploy.base_model": HOSTILE.replace("..", ""),
        "lora_deploy.versions": json.dumps({HOSTILE: HOSTILE}),
        "lora_deploy.adapters": json.dumps(
            {"one": {"sha256": "0" * 64, "config": {"r": HOSTILE, "lora_alpha": [HOSTILE]}}}
        ),
    }
    entries["lora_deploy.precision"] = HOSTILE
    monkeypatch.setattr(pages, "read_metadata", lambda directory: entries)
    content = parity_page(directory, report.model_copy(update=changes), {HOSTILE: directory})
    page = assert_alone(content)
    assert sum(HOSTILE in text for text in (*page.texts, *page.titles)) > 8
    assert b"<script" not in content
    assert content.count(b"</style>") == 1


_ANY = st.floats(allow_nan=True, allow_infinity=True)
_METRICS = st.builds(
    Metrics, max_abs=_ANY, mean_kl=_ANY, max_kl=_ANY, top1=_ANY, tokens=st.integers(0), ties=st.integers(0)
)
_CASES = st.builds(
    CaseResult,
    adapter=st.text(max_size=40),
    name=st.text(max_size=80),
    export=_METRICS,
    control=st.none() | _METRICS,
    passed=st.booleans(),
)
_LAYERS = st.builds(LayerErrors, export=st.lists(_ANY, max_size=4), control=st.none() | st.lists(_ANY, max_size=4))
_TEXTS = st.builds(
    TextResult,
    name=st.text(max_size=9),
    tokens=st.integers(0),
    kl=_ANY,
    top1=_ANY,
    loss=st.none() | _ANY,
    base_kl=st.none() | _ANY,
)
_DEPLOYMENTS = st.builds(
    DeploymentResult,
    texts=st.lists(_TEXTS, min_size=1, max_size=3),
    bits=_ANY,
    survives=st.none() | _ANY,
    layers=st.dictionaries(st.text("ab.0123", max_size=9), _ANY, max_size=5),
    cache_errors=st.lists(_ANY, max_size=4),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    cases=st.lists(_CASES, min_size=1, max_size=4),
    layers=st.lists(_LAYERS, max_size=3),
    deployment=st.none() | _DEPLOYMENTS,
    max_kl=st.none() | _ANY,
)
def test_whatever_was_found_can_be_drawn(export: Callable[..., Path], **changes: Any) -> None:
    """An export must not be lost because its numbers are odd."""
    directory = export()
    report = ParityReport.model_validate_json((directory / "parity.json").read_text())
    page = assert_alone(parity_page(directory, report.model_copy(update=changes), {}))
    for name in ("x", "y", "cx", "cy", "width", "height", "fill-opacity"):
        for value in (values[name] for _, values in page.elements if name in values):
            assert math.isfinite(float(value))


def test_a_name_that_is_no_text_does_not_stop_the_page(export: Callable[..., Path]) -> None:
    directory = export()
    report = ParityReport.model_validate_json((directory / "parity.json").read_text())
    assert b"a?b" in parity_page(directory, report.model_copy(update={"notes": ["a\udcffb"]}), {})


def test_the_page_is_sealed_and_of_this_report(export: Callable[..., Path], tmp_path: Path) -> None:
    own = Path(shutil.copytree(export(), tmp_path / "own"))
    whole = (own / "report.html").read_bytes()
    check_files(own)
    for changed in (whole.replace(b"Passed", b"passed", 1), whole + b" ", b"<html>mine</html>"):
        (own / "report.html").write_bytes(changed)
        with pytest.raises(CheckpointError, match="the page of the parity report is damaged"):
            check_files(own)
    shutil.copyfile(export("int4") / "report.html", own / "report.html")
    with pytest.raises(CheckpointError, match="of another export"):
        check_files(own)
    (own / "report.html").write_bytes(whole)
    report = ParityReport.model_validate_json((own / "parity.json").read_text())
    report.model_copy(update={"notes": ["another"]}).save(own)
    assert not (own / "report.html").exists()  # it would show the older report
    check_files(own)
    (own / "report.html").write_bytes(whole)
    with pytest.raises(CheckpointError, match="of another report"):
        check_files(own)
    save_report(own, report, {})
    check_files(own)


def test_without_a_check_there_is_no_page(
    checkpoint_dir: CheckpointFactory, adapter_dir: Callable[..., Path], tmp_path: Path, command: Command
) -> None:
    base, adapter = checkpoint_dir("llama", **SHORT["llama"]), adapter_dir("llama")
    given = (
        "export",
        "--merge",
        "--model",
        base,
        "--adapter",
        adapter,
        "--quantization",
        "nf4",
        "--output",
        tmp_path / "out",
    )
    assert command(*given).code == 0
    assert (tmp_path / "out" / "report.html").is_file()
    assert command(*given, "--no-verify", "--overwrite").code == 0
    assert not (tmp_path / "out" / "report.html").exists()
    assert not (tmp_path / "out" / "parity.json").exists()
