"""Training against PEFT on the same NF4 base: time of a step, bytes kept for the backward, peak memory.

    python -m tests.benchmarks.training [--model DIR] [--rounds 3] [--steps 4] [--batch 4] [--length 128] [--rank 16]
                                        [--json FILE]

Each side trains in processes of its own, which take turns. All linear layers are adapted, every token is learned. A
step is forward, backward and AdamW; the first of a process is not counted. The processor's seconds, over all threads,
depend less on what else the machine does. Bytes are those of the different storages that autograd keeps when the
forward has ended, parameters and buffers apart. Peak is the kernel's VmHWM of the process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from tests.benchmarks.processes import compare, write_entries

SIDES = ("ours", "PEFT")
# In the order of `Step`: name, factor, unit.
_MEASURED = (
    ("step", 1.0, "s"),
    ("processor time of a step", 1.0, "s"),
    ("kept for the backward", 1e-6, "MB"),
    ("peak memory", 1e-6, "MB"),
)


class Step(NamedTuple):
    """What one process measured: seconds of a step, those of the processor, bytes kept for the backward and at most."""

    seconds: float
    processor: float
    kept: int
    peak: int


def run(side: str, model: Path, steps: int, batch: int, length: int, rank: int) -> Step:
    """Train in a process of its own.

    Args:
        side: One of SIDES.
        model: The base.
        steps: How many are timed.
        batch: Rows of a step.
        length: Tokens of each row.
        rank: Of the adapter.
    """
    asked = json.dumps([side, str(model), steps, batch, length, rank])
    command = [sys.executable, "-m", "tests.benchmarks.training", "--one", asked]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    return Step(*json.loads(ended.stdout.splitlines()[-1]))


def _one(side: str, model: str, steps: int, batch: int, length: int, rank: int) -> None:
    """In a process of its own: print what it measured."""
    import torch

    network, loss = (_ours if side == "ours" else _peft)(model, rank)
    ids = torch.randint(3, network.config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(0))
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    seconds: list[tuple[float, float]] = []
    for _ in range(steps + 1):
        began, worked = time.perf_counter(), time.process_time()
        loss(ids).backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append((time.perf_counter() - began, time.process_time() - worked))
    peak = _peak()
    own = {tensor.untyped_storage().data_ptr() for tensor in [*network.parameters(), *network.buffers()]}
    times = map(statistics.median, zip(*seconds[1:], strict=True))
    print(json.dumps([*times, _kept(lambda: loss(ids), own), peak]))


def _ours(directory: str, rank: int) -> tuple[Any, Callable[[Any], Any]]:
    from lora_deploy import LoraConfig, get_lora_model
    from lora_deploy.quantization import load_base_model
    from lora_deploy.train.chunked_loss import can_be_chunked, chunked_loss

    model = get_lora_model(load_base_model(directory, "nf4"), LoraConfig(r=rank, lora_alpha=rank))
    assert can_be_chunked(model)

    def loss(ids: Any) -> Any:
        with chunked_loss(model):
            return model(input_ids=ids, labels=ids, use_cache=False).loss

    return model, loss


def _peft(directory: str, rank: int) -> tuple[Any, Callable[[Any], Any]]:
    import peft
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    scheme = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    options: dict[str, Any] = {"quantization_config": scheme, "dtype": torch.float32, "device_map": "cpu"}
    base = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=False, **options)
    model: Any = peft.get_peft_model(base, peft.LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear"))
    return model.train(), lambda ids: model(input_ids=ids, labels=ids, use_cache=False).loss


class _Kept:
    """A tensor that autograd keeps."""

    def __init__(self, tensor: Any) -> None:
        self.tensor = tensor


def _kept(forward: Callable[[], Any], own: set[int]) -> int:
    """Bytes of the storages that the graph of a result keeps, but for those in `own`."""
    import torch

    packed: list[weakref.ref[_Kept]] = []

    def pack(tensor: Any) -> _Kept:
        kept = _Kept(tensor)
        packed.append(weakref.ref(kept))
        return kept

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
        result = forward()
    alive = [kept.tensor.untyped_storage() for kept in (one() for one in packed) if kept is not None]
    assert result.grad_fn is not None
    return sum({storage.data_ptr(): storage.nbytes() for storage in alive if storage.data_ptr() not in own}.values())


def _peak() -> int:
    """Most bytes of memory that this process ever had."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def main() -> None:
    """Print the medians of both sides and their ratios."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path)
    for name, default in (("rounds", 3), ("steps", 4), ("batch", 4), ("length", 128), ("rank", 16)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", type=Path, help="Write the numbers to this file.")
    parser.add_argument("--one")
    options = parser.parse_args()
    if options.one:
        _one(*json.loads(options.one))
        return
    with tempfile.TemporaryDirectory() as temporary:
        from lora_deploy.demo.model import fetch_smollm2

        model = options.model or fetch_smollm2(Path(temporary) / "model")
        asked = (model, options.steps, options.batch, options.length, options.rank)
        found: dict[str, list[Step]] = {side: [] for side in SIDES}
        for _ in range(options.rounds):
            for side in SIDES:
                found[side].append(run(side, *asked))
    ours, theirs = (Step(*map(statistics.median, zip(*found[side], strict=True))) for side in SIDES)
    print("| | s a step | processor s | MB kept | MB at the peak |\n| --- | --- | --- | --- | --- |")
    for side, step in zip(SIDES, (ours, theirs), strict=True):
        print(
            f"| {side} | {step.seconds:.2f} | {step.processor:.2f} | {step.kept / 1e6:,.0f} | {step.peak / 1e6:,.0f} |"
        )
    ratios = [mine / other for mine, other in zip(ours, theirs, strict=True)]
    print(f"| ratio | {' | '.join(f'{ratio:.2f}' for ratio in ratios)} |")
    if options.json is not None:
        measured = {
            f"training, {name}": compare(*([step[index] * scale for step in found[side]] for side in SIDES), unit)
            for index, (name, scale, unit) in enumerate(_MEASURED)
        }
        write_entries(measured, options.json)


if __name__ == "__main__":
    main()
