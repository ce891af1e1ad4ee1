"""What each way of deploying an adapter keeps of what was learnt: the README's table, from exported files.

    python -m tests.benchmarks.deployed [--model DIR] [--work DIR] [--seeds 0 1 2] [--only NAME] [--answers 40]
        [--json FILE]

For every seed an adapter is trained on SmolLM2-135M-Instruct in NF4 (rank 16, 75 steps, reminders to JSON), deployed in
each way, and every exported file is run in onnxruntime against the function that was trained, teacher-forced: on
held-out reminders (their answers), and on general English that no calibration has seen. Products of int4 and int8 leave
activations as they are (accuracy level 0) but for the answers, which come from the file as it is exported, greedily.

Bits are of the linear layers, with 16-bit scales, as the layout would be stored in an fp16 graph. Rows that no option
of lora-deploy gives, because they lose what was learnt, are made by rewriting the weights of an exported file.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
import torch

from lora_deploy.adapter import apply_adapter, read_adapter
from lora_deploy.demo.model import fetch_smollm2
from lora_deploy.demo.task import write_task
from lora_deploy.export import export_onnx
from lora_deploy.manifest import Manifest
from lora_deploy.quantization import DenseWeight, QuantizationScheme, quantize
from lora_deploy.quantization.affine import round_to_nearest
from lora_deploy.quantization.base import TrainingBase
from lora_deploy.requantize import Requantization
from lora_deploy.requantize.text import HELD_OUT, Text, load_text
from lora_deploy.run import OnnxModel
from lora_deploy.run.session import OnnxSession
from lora_deploy.terminal import make_console
from lora_deploy.train import TrainOptions, train_adapter
from lora_deploy.verify.reference import compute_logits, load_twin
from lora_deploy.verify.texts import Logits, compare_on_text
from tests.benchmarks.processes import Entry, compare, write_entries

_NF4 = QuantizationScheme(method="nf4")
_ROWS = 4  # of a text at once, as compare_on_text takes them
Rewrite = Callable[[torch.Tensor], torch.Tensor]


# Our ways, and the other exporters' that they stand against.
_OTHERS = {
    "merged fp16": "merged into the original weights, fp16",
    "merged int4, calibrated": "the same, then int4 to nearest",
    "NF4 codes and branch in int8": "merged, back to NF4",
}


def _to_int4(values: torch.Tensor) -> torch.Tensor:
    return round_to_nearest(values, 4, 32).dequantize()


def _to_nf4(values: torch.Tensor) -> torch.Tensor:
    return quantize(DenseWeight(values).values, _NF4).dequantize()


def _to(bits: Literal[4, 8], **options: Any) -> dict[str, Any]:
    return {"requantization": Requantization(bits, head=None, **options), "precision": f"int{bits}"}


# name, options of the export, whether the base is the original one, and what is done to the weights of the file
WAYS: list[tuple[str, dict[str, Any], bool, Rewrite | None]] = [
    ("merged fp16", {"precision": "fp16"}, False, None),
    ("merged into the original weights, fp16", {"precision": "fp16"}, True, None),
    ("the same, then int4 to nearest", {"precision": "fp32"}, True, _to_int4),
    ("merged, back to NF4", {"precision": "fp32"}, False, _to_nf4),
    ("merged int4 to nearest", {"precision": "fp32"}, False, _to_int4),
    ("merged int8, block 32", _to(8), False, None),
    ("merged int8, block 128", _to(8, blocksize=128), False, None),
    ("merged int4, fitted scales", _to(4, rows=0), False, None),
    ("merged int4, calibrated", _to(4), False, None),
    (
        "merged int4, correction of rank 28",
        _to(4, correction=28),
        False,
        None,
    ),
    (
        "merged int4 and int8, 5.25 bits",
        _to(4, budget_bits=5.25),
        False,
        None,
    ),
    ("NF4 codes and branch in int8", {"merge": False, "branch": "fixed", "adapter_precision": "int8"}, False, None),
]


class Bench:
    """One seed: the adapter, its exports, and what they are compared with.

    Args:
        work: Where everything is written.
        model: The base.
        seed: Of data and training.
        answers: How many reminders are answered.
    """

    def __init__(self, work: Path, model: Path, seed: int, answers: int) -> None:
        self.model, self.directory = model, work / f"seed{seed}"
        self.adapter = self.directory / "adapter"
        data, self.held_out = write_task(self.directory / "data", held_out=100, seed=seed)
        self.answers = self.held_out[:answers]
        if not (self.adapter / "adapter_model.safetensors").exists():
            self._train(data, seed)
        self.base = TrainingBase(model, _NF4)
        self.texts = [
            load_text("task", self.directory / "data" / "held_out.jsonl", self.base, 40),
            load_text("general", HELD_OUT, self.base, 32),
        ]
        self._reference: dict[str, list[torch.Tensor]] = {}

    def _train(self, data: Path, seed: int) -> None:
        options = TrainOptions(
            model=str(self.model),
            data=data,
            output=self.adapter,
            quantization="nf4",
            rank=16,
            alpha=32,
            max_steps=75,
            batch_size=8,
            learning_rate=1e-3,
            schedule="cosine",
            seed=seed,
            overwrite=True,
        )
        train_adapter(options, console=make_console(True, False))

    def export(self, name: str, options: dict[str, Any], original: bool, rewrite: Rewrite | None) -> Path:
        """The exported file, made once."""
        output = self.directory / name.replace(" ", "-").replace(",", "")
        if (output / "model.onnx").exists():
            return output
        adapter = self.adapter
        if original:  # without the record that says what the adapter was trained on
            adapter = self.directory / "adapter-without-record"
            adapter.mkdir(exist_ok=True)
            for file in ("adapter_config.json", "adapter_model.safetensors"):
                shutil.copy(self.adapter / file, adapter / file)
            options = options | {"quantization": "none"}
        export_onnx(self.model, adapter, output=output, verify=False, **options)
        if rewrite is not None:
            rewrite_weights(output, rewrite)
        return output

    def reference(self, text: Text) -> Logits:
        """The trained function's logits, computed once."""
        if text.name not in self._reference:
            twin = load_twin(self.base)
            apply_adapter(twin, read_adapter(self.adapter)).eval()
            self._reference[text.name] = [
                compute_logits(twin, batch.input_ids, batch.attention_mask) for batch in text.batches(_ROWS)
            ]
        kept: Iterator[torch.Tensor] = iter(self._reference[text.name])
        return lambda ids, mask: next(kept)

    def measure(self, name: str, output: Path) -> dict[str, Any]:
        """KL and top-1 on both texts, and the share of reminders that are answered exactly."""
        session = OnnxSession(output, exact_activations=True)
        row: dict[str, Any] = {"way": name, "bits": stored_bits(output, self.base)}
        for text in self.texts:
            result = compare_on_text(text, self.reference(text), _logits_of(session))
            row |= {f"{text.name} KL": result.kl, f"{text.name} top-1": result.top1, f"{text.name} loss": result.loss}
        del session
        model = OnnxModel(output)
        answers = [model.generate(one["prompt"], max_new_tokens=48) for one in self.answers]
        right = [answer == one["completion"] for answer, one in zip(answers, self.answers, strict=True)]
        return row | {"exact": sum(right) / len(right)}


def _logits_of(session: OnnxSession) -> Logits:
    def logits(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(session.forward(ids.numpy(), mask.numpy())[0])

    return logits


def rewrite_weights(output: Path, rewrite: Rewrite) -> None:
    """Let the linear layers of an fp32 export, but the head, hold what a rounding leaves of them."""
    model = ir.load(output / "model.onnx")
    head = model.graph.outputs[0].producer()
    data = next(output.glob("*.onnx.data"))
    array = np.memmap(data, dtype=np.uint8, mode="r+")
    for node in model.graph:
        if node.op_type != "FusedMatMul" or node is head:
            continue
        tensor = node.inputs[1].const_value  # type: ignore[union-attr]
        assert isinstance(tensor, ir.ExternalTensor)
        values = array[tensor.offset : tensor.offset + tensor.length].view(np.float32)
        rounded = rewrite(torch.from_numpy(values.copy()).view(tuple(tensor.shape.numpy())))
        values[:] = rounded.numpy().reshape(-1)
    array.flush()


def stored_bits(output: Path, base: TrainingBase) -> float | None:
    """Bits of a weight of the linear layers, scales as 16 bits; None where they are floats or were rewritten."""
    model = ir.load(output / "model.onnx")
    manifest = Manifest.read(model.metadata_props, output)
    if not manifest.coded:
        return None
    sizes = {name: layer.shape[0] * layer.shape[1] for name, layer in base.linears.items()}
    bits = 0.0
    initializers = model.graph.initializers
    for weight in manifest.coded:
        if any(module.name not in sizes for module in weight.modules):
            continue
        bits += 8 * initializers[weight.codes].const_value.nbytes  # type: ignore[union-attr]
        bits += 16 * initializers[weight.scales].const_value.size  # type: ignore[union-attr]
    for slot in (*manifest.slots, *manifest.correction):
        for name in slot.input_names:
            tensor = initializers[name].const_value
            assert tensor is not None
            bits += (8 if tensor.dtype == ir.DataType.INT8 else 16) * tensor.size
    return round(bits / sum(sizes.values()), 3)


def compare_with_others(rows: dict[str, list[dict[str, Any]]]) -> dict[str, Entry]:
    """How far our ways are from the trained function, beside what other exporters do; those that were measured."""
    return {
        f"{own}, to {other}: {text} KL": compare(
            [row[f"{text} KL"] for row in rows[own]], [row[f"{text} KL"] for row in rows[other]], "nats a token"
        )
        for own, other in _OTHERS.items()
        if rows.get(own) and rows.get(other)
        for text in ("task", "general")
    }


def main() -> None:
    """Measure and print a line of JSON for every seed and way, and the medians as a table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--answers", type=int, default=40)
    parser.add_argument("--only", help="ways with this in their name")
    parser.add_argument("--export-only", action="store_true", help="make the files and measure nothing")
    parser.add_argument("--json", type=Path, help="where the comparisons with other exporters' ways are written")
    options = parser.parse_args()
    ways = [way for way in WAYS if options.only is None or options.only in way[0]]
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name, *_ in ways}
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        model = options.model or fetch_smollm2(work / "model")
        for seed in options.seeds:
            bench = Bench(work, model, seed, options.answers)
            for name, arguments, original, rewrite in ways:
                output = bench.export(name, arguments, original, rewrite)
                if not options.export_only:
                    rows[name].append({"seed": seed, **bench.measure(name, output)})
                    print(json.dumps(rows[name][-1]), flush=True)
    if options.json is not None:
        write_entries(compare_with_others(rows), options.json)
    for name, found in rows.items() if not options.export_only else ():
        middle = {
            key: statistics.median(row[key] for row in found)
            for key in ("task KL", "task top-1", "exact", "general KL", "general top-1")
        }
        print(
            f"| {name} | {found[0]['bits'] or ''} | {middle['task KL']:.1e} | {middle['task top-1']:.1%} "
            f"| {middle['exact']:.2f} | {middle['general KL']:.1e} | {middle['general top-1']:.1%} |"
        )


if __name__ == "__main__":
    main()
