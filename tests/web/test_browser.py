"""Exports in a real browser: what it writes is what Python writes, token by token, with and without an adapter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lora_deploy.export import export_onnx
from lora_deploy.run import OnnxModel
from lora_deploy.web import write_page
from tests.web.conftest import Opened

PROMPT = "Grüße, 你"


def ask(page: Any, prompt: str, adapter: str | None = None, limit: int = 20) -> list[int]:
    """The tokens of an answer in a new chat."""
    page.click("#clear")
    if page.is_enabled("#adapter"):
        page.select_option("#adapter", adapter or "")
    page.fill("#tokens", str(limit))
    page.fill("#prompt", prompt)
    page.click("#send")
    page.wait_for_selector("body[data-state=busy]", state="detached", timeout=300_000)
    assert page.get_attribute("body", "data-state") == "ready", page.inner_text("#status")
    return [int(token) for token in page.get_attribute("article.assistant", "data-tokens").split()]


def expected(export: Path, prompt: str, adapter: str | None = None, limit: int = 20) -> list[int]:
    """The same in Python."""
    model = OnnxModel(export, adapter)
    return list(model.generate_tokens(model.encode(prompt), max_new_tokens=limit))


@pytest.mark.parametrize(("branch", "where"), [("hot-swap", "WASM"), ("pooled", "WASM"), ("hot-swap", "WebGPU")])
def test_adapters_go_in_and_out(
    branch: str, where: str, talking_branch: Callable[..., Path], opened: Opened, tmp_path: Path
) -> None:
    export = talking_branch(branch)
    written = write_page(export, tmp_path / "page")
    assert written.adapters == ("a", "b")
    answers = {adapter: expected(export, PROMPT, adapter) for adapter in (None, "a", "b")}
    assert len(set(map(tuple, answers.values()))) == 3
    with opened(tmp_path / "page", gpu=where == "WebGPU") as page:
        fetched = []
        page.on("request", lambda request: fetched.append(request.url))
        assert where in page.inner_text("#status")
        for adapter in (None, "a", "b", "a", None):
            assert ask(page, PROMPT, adapter) == answers[adapter]
        # The base is not loaded again.
        assert all("adapter-" in url for url in fetched)
        assert len(fetched) == (2 if branch == "hot-swap" else 0)


def test_half_precision_runs_where_it_can(talking_export: Callable[..., Any], opened: Opened, tmp_path: Path) -> None:
    base = talking_export()[0]
    export = export_onnx(base, output=tmp_path / "half", precision="fp16", provider="webgpu", verify=False).output
    write_page(export, tmp_path / "page")
    # SwiftShader is a GPU without 16 bits.
    with opened(tmp_path / "page", gpu=True) as page:
        assert page.evaluate("navigator.gpu.requestAdapter().then((gpu) => gpu.features.has('shader-f16'))") is False
        assert "WASM" in page.inner_text("#status")
        assert ask(page, PROMPT) == expected(export, PROMPT)


@pytest.mark.parametrize(("cache", "where"), [("growing", "WebGPU"), ("in-place", "WASM")])
def test_merged_codes_run_where_they_are_right(
    cache: str, where: str, talking_export: Callable[..., Any], opened: Opened, tmp_path: Path
) -> None:
    options: Any = {"precision": "int4", "accuracy_level": 0, "cache": cache, "verify": False}
    export = export_onnx(talking_export()[0], output=tmp_path / "int4", **options).output
    write_page(export, tmp_path / "page")
    # WebGPU's attention with a bias is right for 31 tokens, and wrong for 32.
    long = PROMPT * 3
    assert len(OnnxModel(export).encode(long)) > 40
    with opened(tmp_path / "page", gpu=True) as page:
        assert where in page.inner_text("#status")
        assert ask(page, long) == expected(export, long)


def test_a_merged_export_and_a_chat(talking_export: Callable[..., Any], opened: Opened, tmp_path: Path) -> None:
    export = talking_export()[1]
    write_page(export, tmp_path / "page")
    model = OnnxModel(export)
    with opened(tmp_path / "page") as page:
        assert not page.is_enabled("#adapter")
        assert page.title() == export.name
        first = ask(page, PROMPT)
        assert first == expected(export, PROMPT)
        text = model.tokenizer.decode(first, skip_special_tokens=True)
        assert page.inner_text("article.assistant span").strip() == text.strip()
        # What was said goes into the next turn.
        page.fill("#prompt", "And then?")
        page.press("#prompt", "Enter")
        page.wait_for_selector("article.assistant[data-tokens] ~ article.assistant[data-tokens]")
        conversation = [("user", PROMPT), ("assistant", text), ("user", "And then?")]
        tokens = model.encode_chat([{"role": role, "content": content} for role, content in conversation])
        second = list(model.generate_tokens(tokens, max_new_tokens=20))
        found = page.locator("article.assistant").last.get_attribute("data-tokens")
        assert found == " ".join(map(str, second))


def test_an_answer_can_be_stopped(talking_export: Callable[..., Any], opened: Opened, tmp_path: Path) -> None:
    export = talking_export()[1]
    write_page(export, tmp_path / "page")
    whole = expected(export, PROMPT, limit=200)
    with opened(tmp_path / "page") as page:
        page.fill("#tokens", "200")
        page.fill("#prompt", PROMPT)
        page.evaluate("document.getElementById('send').click(); document.getElementById('stop').click()")
        page.wait_for_selector("article.assistant[data-tokens]")
        found = [int(token) for token in page.get_attribute("article.assistant", "data-tokens").split()]
        assert 0 < len(found) < len(whole)
        assert found == whole[: len(found)]
        assert ask(page, PROMPT) == whole[:20]


def test_a_prompt_that_is_too_long_is_refused_and_forgotten(
    talking_export: Callable[..., Any], opened: Opened, tmp_path: Path
) -> None:
    export = talking_export()[1]
    write_page(export, tmp_path / "page")
    with opened(tmp_path / "page") as page:
        page.fill("#prompt", "much too long " * 20)
        page.press("#prompt", "Enter")
        page.wait_for_selector("body[data-state=failed]")
        assert "and the model takes 128" in page.inner_text("#status")
        page.fill("#prompt", PROMPT)
        page.fill("#tokens", "20")
        page.press("#prompt", "Enter")
        page.wait_for_selector("article.assistant[data-tokens]")
        found = page.get_attribute("article.assistant[data-tokens]", "data-tokens")
        assert found == " ".join(map(str, expected(export, PROMPT)))


def test_what_is_missing_is_said(talking_export: Callable[..., Any], opened: Opened, tmp_path: Path) -> None:
    write_page(talking_export()[1], tmp_path / "page")
    (tmp_path / "page/model/tokenizer.json").unlink()
    with opened(tmp_path / "page", wait=False) as page:
        page.wait_for_selector("body[data-state=failed]", timeout=60_000)
        assert "tokenizer.json: the server answers 404" in page.inner_text("#status")
