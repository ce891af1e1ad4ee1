"""What somebody who means harm can do to an export: change it, and make its hashes and seal anew."""

from __future__ import annotations

import json
from pathlib import Path

import onnx_ir as ir

from lora_deploy.export.writer import write_model
from lora_deploy.integrity import FILES_ENTRY, hash_file

__all__ = ["reseal", "save_graph"]


def save_graph(model: ir.Model, directory: Path) -> None:
    """Write a changed graph, with the hashes of what lies beside it now, and a seal that fits."""
    recorded = json.loads(model.metadata_props[FILES_ENTRY])
    files = {name: hash_file(directory / name) for name in recorded if (directory / name).is_file()}
    model.metadata_props[FILES_ENTRY] = json.dumps(files)
    write_model(model, directory)
    for name in ("parity.json", "report.html"):
        (directory / name).unlink(missing_ok=True)  # it is of another graph


def reseal(directory: Path) -> None:
    """Record the files of an export as they are now."""
    save_graph(ir.load(directory / "model.onnx"), directory)
