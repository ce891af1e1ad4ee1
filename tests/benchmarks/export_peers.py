"""Time and peak memory of an export beside those of the peers', on the same weights.

    python -m tests.benchmarks.export_peers [--shape 1.1b] [--precisions fp32 fp16 int4] [--peers genai mobius]
        [--runs 3] [--work DIR] [--json FILE]

Ours takes a random adapter of rank 16 on all linear layers, trained on NF4: it quantizes each dense weight as training
did, merges, and writes the precision that is asked for, without the parity check, which the peers have none of. The
peers convert the dense model: onnxruntime-genai's builder, and mobius (fp32 only). int4 is rounded to nearest by
the builder, and ours is not calibrated either. Each export is a process of its own; they take turns, and what they
write is removed. Shapes: SmolLM2-135M-Instruct itself, a random 1.1B Llama (22 layers, hidden 2048, intermediate 5632,
vocabulary 32000), and a random 8B one (32 layers, hidden 4096, intermediate 14336, vocabulary 128256), ours only.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lora_deploy.demo.model import fetch_smollm2
from tests.benchmarks.export_memory import write_checkpoint, write_random_adapter
from tests.benchmarks.processes import Ended, Entry, compare, run_process, take_turns, write_entries
from tests.run.conftest import byte_tokenizer

PRECISIONS = ("fp32", "fp16", "int4")
# Which precisions of a peer are compared.
PEERS: dict[str, tuple[str, ...]] = {"genai": PRECISIONS, "mobius": ("fp32",)}
SHAPES: dict[str, dict[str, Any]] = {
    "1.1b": {"num_hidden_layers": 22, "intermediate_size": 5632, "num_key_value_heads": 4},
    "8b": {"num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 14336, "vocab_size": 128256},
}
_ALONE = ("8b",)


def make_model(shape: str, work: Path) -> Path:
    """A checkpoint in bfloat16, with a tokenizer; one that is there already is kept.

    Args:
        shape: "smollm2", or one of `SHAPES`, with random weights.
        work: Where it goes, as a directory of the shape's name.
    """
    directory = work / shape
    if shape == "smollm2":
        return fetch_smollm2(directory)
    if not directory.exists():
        torch.manual_seed(0)
        fields = dict(SHAPES[shape])
        write_checkpoint(directory, fields.pop("num_hidden_layers"), **fields)
        byte_tokenizer().save_pretrained(directory)
    return directory


def export_command(maker: str, model: Path, adapter: Path, precision: str, output: Path) -> list[str | Path]:
    """The command line of an export.

    Args:
        maker: "ours", or one of `PEERS`.
        model: The dense checkpoint.
        adapter: Of ours.
        precision: Of the weights.
        output: Where it is written.
    """
    if maker == "genai":
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", model, "-o", output]
        return [*command, "-p", precision, "-e", "cpu", "-c", output / "cache"]
    if maker == "mobius":
        return [Path(sys.executable).with_name("mobius"), "build", "--config", model, output, "--ep", "cpu"]
    command = [sys.executable, "-m", "lora_deploy", "export", "--model", model, "--adapter", adapter, "--merge"]
    command += ["--quantization", "nf4", "--precision", precision, "--no-verify", "--quiet", "--output", output]
    return [*command, *(["--calibration-rows", "0"] if precision == "int4" else [])]


def measure(model: Path, work: Path, precision: str, peers: list[str], runs: int) -> dict[str, Entry]:
    """Seconds and peak memory of ours beside each peer's, for one precision."""
    adapter = work / f"{model.name}-adapter"
    if not adapter.exists():
        torch.manual_seed(1)
        write_random_adapter(model, adapter)
    output = work / "out"

    def export(maker: str) -> Ended:
        try:
            return run_process(export_command(maker, model, adapter, precision, output), HF_HUB_OFFLINE="1")
        finally:
            shutil.rmtree(output, ignore_errors=True)

    rivals = [peer for peer in peers if precision in PEERS[peer]]
    makers: dict[str, Callable[[], Ended]] = {maker: partial(export, maker) for maker in ("ours", *rivals)}
    found = take_turns(makers, runs)
    entries: dict[str, Entry] = {}
    for rival in rivals or [None]:
        name = f"{model.name} {precision}" + (f", {rival}" if rival else "")
        for what, unit in (("seconds", "s"), ("peak_bytes", "GB")):
            scale = 1e-9 if unit == "GB" else 1.0
            values = {maker: [getattr(ended, what) * scale for ended in found[maker]] for maker in found}
            entries[f"{name}: {'time' if unit == 's' else 'peak memory'}"] = compare(
                values["ours"], values[rival] if rival else None, unit
            )
    return entries


def main() -> None:
    """Measure and print one line of JSON for each comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=["smollm2", *SHAPES], default="1.1b")
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--peers", nargs="*", choices=list(PEERS), default=list(PEERS))
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--work", type=Path, help="where models are made, and kept")
    parser.add_argument("--json", type=Path, help="where the comparisons are written")
    asked = parser.parse_args()
    peers = [] if asked.shape in _ALONE else asked.peers
    entries: dict[str, Entry] = {}
    with tempfile.TemporaryDirectory() as temporary:
        work = asked.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        model = make_model(asked.shape, work)
        for precision in asked.precisions:
            entries |= measure(model, work, precision, peers, asked.runs)
    write_entries(entries, asked.json)


if __name__ == "__main__":
    main()
