"""Make the hostile files of this folder, the same bytes every time, and the tables of the README.

    python -m tests.attacks.onnx.make

Every file is an honest little export, or its adapter, with one lie in it.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
from onnx import ModelProto, TensorProto, ValueInfoProto, helper

from lora_deploy.manifest import Manifest

HERE = Path(__file__).parent
VOCABULARY, WIDTH = 260, 4
RUN, VERIFY, CONVERT, INSPECT = "run", "verify", "adapter convert", "adapter inspect"
ALL = (RUN, VERIFY, CONVERT)

_TABLE = np.linspace(-1, 1, VOCABULARY * WIDTH, dtype=np.float32)
_HEAD = np.cos(np.arange(VOCABULARY * WIDTH, dtype=np.int32) % 7).astype(np.float32)
WEIGHTS = _TABLE.tobytes() + _HEAD.tobytes()
SHA256 = hashlib.sha256(WEIGHTS).hexdigest()
DATA = f"model-{SHA256[:12]}.onnx.data"
SLOT = {"name": "lin", "inputs": WIDTH, "outputs": VOCABULARY, "parts": [{"module": "lin", "rows": [0, VOCABULARY]}]}
A, B = "lin/lora_A", "lin/lora_B"


class Case(NamedTuple):
    """A hostile file: its bytes, what it does, and the commands that must refuse it."""

    content: bytes
    does: str
    commands: tuple[str, ...]


def metadata() -> dict[str, str]:
    """What the honest graph says of itself."""
    slots = json.dumps([{**SLOT, "parts": [{**SLOT["parts"][0], "in_order": True}]}], separators=(",", ":"))  # type: ignore[index]
    entries = {
        "mode": "branch",
        "precision": "fp32",
        "compute_dtype": "fp32",
        "base_sha256": "b" * 64,
        "quantization": '{"method":"none"}',
        "branch": "hot-swap",
        "slots": slots,
        "provider": "cpu",
        "data_sha256": SHA256,
        "adapters": json.dumps({"own": {"sha256": "a" * 64}}),
    }
    return {f"lora_deploy.{name}": value for name, value in entries.items()}


def fingerprint() -> int:
    """The model version of its adapters."""
    return Manifest.read(metadata(), "model.onnx").fingerprint


def external(
    name: str, location: str | bytes | None, offset: object = 0, length: object = 4160, dims: tuple[int, ...] = (4, 260)
) -> TensorProto:
    """A tensor whose values are in another file."""
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=dims, data_location=TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        if value is not None:
            entry = tensor.external_data.add()
            entry.key, entry.value = key, value if isinstance(value, bytes) else str(value)  # type: ignore[assignment]
    return tensor


def inline(name: str, dims: tuple[int, ...], raw: bytes = b"", data_type: int = TensorProto.FLOAT) -> TensorProto:
    """A tensor whose values are in the graph."""
    return TensorProto(name=name, data_type=data_type, dims=dims, raw_data=raw)


def _value(name: str, shape: list[int | str] | None, data_type: int = TensorProto.FLOAT) -> ValueInfoProto:
    return helper.make_tensor_value_info(name, data_type, shape)


def honest() -> ModelProto:
    """Logits of a table and a head, and a slot beside the head."""
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["x"]),
        helper.make_node("MatMul", ["x", "head"], ["base"]),
        helper.make_node("MatMul", ["x", A], ["low"]),
        helper.make_node("MatMul", ["low", B], ["update"]),
        helper.make_node("Add", ["base", "update"], ["logits"]),
    ]
    inputs = [_value(name, ["batch", "tokens"], TensorProto.INT64) for name in ("input_ids", "attention_mask")]
    inputs += [_value(A, [WIDTH, "rank"]), _value(B, ["rank", VOCABULARY])]
    tensors = [
        external("table", DATA, dims=(VOCABULARY, WIDTH)),
        external("head", DATA, offset=4160),
        inline(A, (WIDTH, 0)),
        inline(B, (0, VOCABULARY)),
    ]
    graph = helper.make_graph(nodes, "honest", inputs, [_value("logits", ["batch", "tokens", VOCABULARY])], tensors)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10, producer_name="lora-deploy")
    helper.set_model_props(model, metadata())
    return model


def write(directory: Path, cases: dict[str, Case], suffix: str) -> list[str]:
    """Write the files of a kind; returns their rows of the table."""
    directory.mkdir(exist_ok=True)
    for file in directory.glob("*"):
        file.unlink()
    rows = []
    for name, case in sorted(cases.items()):
        (directory / f"{name}{suffix}").write_bytes(case.content)
        rows.append(f"| `{directory.name}/{name}{suffix}` | {case.does} | {', '.join(case.commands)} |")
    return rows


def main() -> None:
    """Write all files, and the tables."""
    from tests.attacks.onnx import adapters, graphs, manifests

    tables = []
    for kind, suffix in ((graphs, ".onnx"), (manifests, ".json"), (adapters, ".onnx_adapter")):
        name = kind.__name__.rpartition(".")[2]
        rows = write(HERE / name, kind.cases(), suffix)
        tables.append("\n".join([f"## {name}", "", "| file | what it does | refused by |", "|---|---|---|", *rows]))
    text = (HERE / "README.md").read_text(encoding="utf-8")
    (HERE / "README.md").write_text(text.partition("## graphs")[0] + "\n\n".join(tables) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
