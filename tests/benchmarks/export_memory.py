"""Time and peak memory of the export of a 1.1B model, and of one with twice the layers.

    python -m tests.benchmarks.export_memory [--quantization nf4] [--precision fp16] [--layers 16 32] [--branch]
        [--json FILE]

Writes random Llama checkpoints (hidden 2048, intermediate 8192, vocabulary 32000, 8 KV heads, bf16; 2.1 GB for 16
layers) and random adapters of rank 16 on all linear layers, exports each in a process of its own, without the parity
check (which needs the reference model in memory), and reads the kernel's VmHWM: every resident page, mapped files
included.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from lora_deploy.adapter import LoraAdapter, LoraUpdate, write_adapter
from lora_deploy.config import LoraConfig
from lora_deploy.quantization.base import TrainingBase
from tests.benchmarks.processes import Entry, compare, write_entries

_EXPORT = """
import sys, time
start = time.perf_counter()
from lora_deploy import export_onnx
model, adapter, output, quantization, precision = sys.argv[1:]
options = {"merge": False} if precision == "branch" else {"precision": precision}
result = export_onnx(model, adapter, output=output, quantization=quantization, verify=False, **options)
seconds = time.perf_counter() - start
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]
print(f'{{"seconds": {seconds:.1f}, "peak_gb": {int(peak) * 1024 / 1e9:.3f}, "bytes": {result.bytes}}}')
"""


def write_checkpoint(directory: Path, layers: int, **fields: int) -> None:
    """A random sharded bf16 checkpoint, written a layer at a time.

    Args:
        directory: Where it goes.
        layers: How many.
        **fields: Of the configuration, where they are not those of a 1.1B model of 16 layers.
    """
    shape = {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 8}
    shape |= {"vocab_size": 32000, "max_position_embeddings": 2048, **fields}
    config = LlamaConfig(num_hidden_layers=layers, dtype="bfloat16", **shape)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(directory)
    hidden, kv = config.hidden_size, config.num_key_value_heads * config.head_dim
    inner, vocabulary = config.intermediate_size, config.vocab_size
    shapes = {"self_attn.q_proj": (hidden, hidden), "self_attn.o_proj": (hidden, hidden)}
    shapes |= {"self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv, hidden)}
    shapes |= {"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner)}
    shards = [{"model.embed_tokens": (vocabulary, hidden), "lm_head": (vocabulary, hidden), "model.norm": (hidden,)}]
    for layer in range(layers):
        norms = {"input_layernorm": (hidden,), "post_attention_layernorm": (hidden,)}
        shards.append({f"model.layers.{layer}.{name}": shape for name, shape in (shapes | norms).items()})
    weight_map = {}
    for number, shard in enumerate(shards):
        file = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        tensors = {
            f"{name}.weight": (torch.randn(shape) * 0.02 + (len(shape) == 1)).to(torch.bfloat16)
            for name, shape in shard.items()
        }
        save_file(tensors, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def write_random_adapter(base: Path, directory: Path, rank: int = 16) -> None:
    """A random adapter on all linear layers of a checkpoint."""
    updates = {
        name: LoraUpdate(torch.randn(rank, layer.shape[1]) * 0.02, torch.randn(layer.shape[0], rank) * 0.02, 2.0)
        for name, layer in TrainingBase(base).linears.items()
    }
    write_adapter(LoraAdapter(LoraConfig(r=rank, lora_alpha=2 * rank), updates), directory)


def main() -> None:
    """Measure and print one line of JSON an export."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, nargs="+", default=[16, 32])
    parser.add_argument("--quantization", nargs="+", default=["none", "nf4"])
    parser.add_argument("--precision", default="fp16")
    parser.add_argument("--branch", action="store_true", help="Not merged: the base's own codes and slots.")
    parser.add_argument("--json", type=Path, help="where the last of the layers beside the first are written")
    options = parser.parse_args()
    found: dict[tuple[str, int], dict[str, float]] = {}
    precision = "branch" if options.branch else options.precision
    for layers in options.layers:
        with tempfile.TemporaryDirectory() as name:
            directory = Path(name)
            write_checkpoint(directory / "base", layers)
            write_random_adapter(directory / "base", directory / "adapter")
            for quantization in options.quantization:
                paths = [str(directory / part) for part in ("base", "adapter", f"out-{quantization}")]
                command = [sys.executable, "-c", _EXPORT, *paths, quantization, precision]
                run = subprocess.run(command, check=True, capture_output=True, text=True)
                measured = found[quantization, layers] = json.loads(run.stdout.splitlines()[-1])
                print(json.dumps({"layers": layers, "quantization": quantization, **measured}), flush=True)
    if options.json is not None:
        write_entries(_compare_depths(found, options.quantization, options.layers, precision), options.json)


def _compare_depths(
    found: dict[tuple[str, int], dict[str, float]], quantizations: list[str], layers: list[int], precision: str
) -> dict[str, Entry]:
    """The model of the most layers beside that of the fewest, which is ours, too."""
    most, fewest = max(layers), min(layers)
    return {
        f"{quantization} to {precision}, {most} layers, to {fewest}: {what}": compare(
            [found[quantization, most][key]], [found[quantization, fewest][key]], unit
        )
        for quantization in quantizations
        for what, key, unit in (("time", "seconds", "s"), ("peak memory", "peak_gb", "GB"))
    }


if __name__ == "__main__":
    main()
