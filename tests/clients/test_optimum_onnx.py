"""optimum-onnx's ORTModels, in an environment of their own, for they need transformers 4.

`LORA_DEPLOY_OPTIMUM_ONNX_PYTHON` is its Python. An ORTModel gives a graph only what it requires, so that a branch alone
is its bare base; an adapter is what the session is opened with (`SessionOptions.add_initializer`).
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lora_deploy.export import export_onnx
from lora_deploy.run import OnnxClassifier
from tests.classifiers import ClassifierFactory, classifier_dir, peft_adapter, remembered_traces, train_with_peft
from tests.clients.conftest import NEW_TOKENS, POOL, Answers, Prompts
from tests.clients.test_genai import write_choice

__all__ = ["classifier_dir", "peft_adapter", "remembered_traces"]

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("optimum_onnx.py")
Ask = Callable[[list[dict[str, Any]]], list[Any]]
TEXTS = ["a good film", "no", "rain again, all day"]


@pytest.fixture(scope="module")
def ask() -> Ask:
    """`ask(jobs)`: what the script answers to its jobs."""
    python = os.environ.get("LORA_DEPLOY_OPTIMUM_ONNX_PYTHON")
    if python is None:
        pytest.skip(
            "needs an environment of its own: python -m venv V && V/bin/pip install torch==2.13.0 && V/bin/pip install "
            "optimum-onnx==0.1.0 onnxruntime, then LORA_DEPLOY_OPTIMUM_ONNX_PYTHON=V/bin/python"
        )

    def run(jobs: list[dict[str, Any]]) -> list[Any]:
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        given = json.dumps([{"optional": None, **job} for job in jobs], default=str)
        done = subprocess.run(
            [python, SCRIPT], input=given, capture_output=True, text=True, timeout=300, env=environment, check=False
        )
        assert done.returncode == 0, done.stderr
        answers: list[Any] = json.loads(done.stdout)
        return answers

    return run


def test_a_language_model_generates_our_tokens(
    ask: Ask, exports: dict[str, Path], prompts: Prompts, ours: Answers, tmp_path: Path
) -> None:
    """The prompts in one batch, padded on the left; in the last one each row has an adapter of its own."""
    merged, swapped, pooled = exports["merge"], exports["hot-swap"], exports["pooled"]
    adapters = [swapped / "adapters" / f"{name}.onnx_adapter" for name in POOL]
    choices = [write_choice(tmp_path / f"{place}.onnx_adapter", [place]) for place in range(len(POOL))]
    mixed = write_choice(tmp_path / "mixed.onnx_adapter", [1, -1, 0])
    jobs: list[dict[str, Any]] = [{"directory": merged}]
    jobs += [{"directory": swapped, "optional": file} for file in (None, *adapters)]
    jobs += [{"directory": pooled, "optional": file} for file in (None, *choices, mixed)]
    rest = {"prompts": prompts.ids, "new_tokens": NEW_TOKENS, "ends": sorted(prompts.ends)}
    found = ask([{**job, **rest} for job in jobs])
    assert found[0] == ours["merge"]["a"]
    assert found[1:4] == [ours["hot-swap"][name] for name in (None, *POOL)]
    assert found[4:7] == [ours["pooled"][name] for name in (None, *POOL)]
    assert found[7] == [ours["pooled"][name][row] for row, name in enumerate(("b", None, "a"))]


def test_a_classifier_gives_our_probabilities(
    ask: Ask, classifier_dir: ClassifierFactory, peft_adapter: ClassifierFactory, tmp_path: Path
) -> None:
    base, adapters = classifier_dir("bert"), {"mood": tmp_path / "mood", "theme": tmp_path / "theme"}
    train_with_peft(base, adapters["mood"], ["query", "dense", "classifier"], task_type=None)
    train_with_peft(base, adapters["theme"], ["value", "pooler.dense"], task_type=None, r=3, lora_alpha=20)
    options: dict[str, Any] = {"quantization": "none", "verify": False}
    merged = export_onnx(base, peft_adapter("bert"), output=tmp_path / "merged", **options).output
    options["merge"] = False
    swapped = export_onnx(base, adapters, output=tmp_path / "swapped", branch="hot-swap", **options).output
    pooled = export_onnx(base, adapters, output=tmp_path / "pooled", branch="pooled", **options).output
    files = {name: swapped / "adapters" / f"{name}.onnx_adapter" for name in adapters}
    choices = {name: write_choice(tmp_path / f"{name}.onnx_adapter", [n]) for n, name in enumerate(adapters)}
    asked: list[tuple[Path, str | None, Path | None]] = [(merged, None, None)]
    asked += [(swapped, name, files.get(str(name))) for name in (None, *adapters)]
    asked += [(pooled, name, choices.get(str(name))) for name in (None, *adapters)]
    tokens = OnnxClassifier(merged).tokenizer(TEXTS, padding=True, return_tensors="np")
    encoded = {name: values.tolist() for name, values in tokens.items()}
    found = ask([{"directory": directory, "optional": file, "encoded": encoded} for directory, _, file in asked])
    probabilities = []
    for (directory, name, _), logits in zip(asked, found, strict=True):
        theirs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        answers = OnnxClassifier(directory, name).classify(TEXTS)
        expected = np.array([list(answer.probabilities.values()) for answer in answers])
        assert np.abs(theirs - expected).max() < 1e-5
        probabilities.append(expected)
    bare = probabilities[1]
    assert np.array_equal(probabilities[4], bare)
    assert all(np.abs(other - bare).max() > 1e-2 for place, other in enumerate(probabilities) if place not in (1, 4))
