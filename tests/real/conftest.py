"""SmolLM2-135M-Instruct with an adapter that was trained on it a little, once for all tests."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from filelock import FileLock

from lora_deploy import cli
from lora_deploy.demo.model import fetch_smollm2
from lora_deploy.demo.task import write_task
from tests.web.conftest import opened

__all__ = ["NEW_TOKENS", "Trained", "genai_tokens", "opened", "run_command", "trained", "twin_tokens"]

NEW_TOKENS = 40


class Trained(NamedTuple):
    """The base, a trained adapter, and prompts that it was not trained on."""

    base: Path
    adapter: Path
    prompts: list[str]


def run_command(*arguments: object) -> None:
    """Run `lora-deploy` with these arguments; it must succeed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["lora-deploy", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
    assert ended.value.code == 0


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """The base, a trained adapter, and prompts that it was not trained on."""
    in_turns = "PYTEST_XDIST_WORKER" in os.environ
    root = tmp_path_factory.getbasetemp()
    root = root.parent if in_turns else root  # which the workers of `-n` share
    directory = root / "real"
    with FileLock(root / "real.lock"):
        if not (directory / "done").exists():
            _train(directory, threads=1 if in_turns else 2)
            (directory / "done").touch()
    held_out = (directory / "data" / "held_out.jsonl").read_text().splitlines()
    return Trained(directory / "base", directory / "adapter", [json.loads(row)["prompt"] for row in held_out[:3]])


def _train(directory: Path, threads: int) -> None:
    base = fetch_smollm2(directory / "base")
    data, _ = write_task(directory / "data")
    own = torch.get_num_threads()
    torch.set_num_threads(threads)
    options = ("--quantization", "nf4", "--rank", 8, "--alpha", 20, "--max-steps", 12, "--batch-size", 8)
    rest = ("--learning-rate", 2e-3, "--output", directory / "adapter", "--quiet")
    run_command("train", "--model", base, "--data", data, *options, *rest)
    torch.set_num_threads(own)


def twin_tokens(model: Any, ids: list[int]) -> list[int]:
    """What the reference generates."""
    with torch.inference_mode():
        generated = model.generate(torch.tensor([ids]), max_new_tokens=NEW_TOKENS, do_sample=False)
    return generated[0, len(ids) :].tolist()  # type: ignore[no-any-return]


def genai_tokens(directory: Path, prompts: list[list[int]], adapter: Path | None = None) -> list[list[int]]:
    """What onnxruntime-genai generates from the same directory, up to and including the end token."""
    genai = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")
    model = genai.Model(str(directory))
    adapters = genai.Adapters(model)
    if adapter is not None:
        adapters.load(str(adapter), "one")
    answers = []
    for ids in prompts:
        parameters = genai.GeneratorParams(model)
        parameters.set_search_options(max_length=len(ids) + NEW_TOKENS, do_sample=False)
        generator = genai.Generator(model, parameters)
        if adapter is not None:
            generator.set_active_adapter(adapters, "one")
        generator.append_tokens(ids)
        answer = []
        while not generator.is_done():
            generator.generate_next_token()
            answer.append(int(generator.get_next_tokens()[0]))
        answers.append(answer)
    return answers
