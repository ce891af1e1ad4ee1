"""Check an export that is there already: its files, where it came from, and what it computes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx_ir as ir

from lora_deploy.adapter import read_adapter
from lora_deploy.errors import CheckpointError, InputError, UsageError
from lora_deploy.export.merge import hash_adapter
from lora_deploy.quantization import QuantizationScheme
from lora_deploy.quantization.base import TrainingBase
from lora_deploy.verify.parity import check_parity
from lora_deploy.verify.report import ParityReport

__all__ = ["verify"]


def verify(
    directory: str | Path,
    *,
    model: str | Path | None = None,
    adapter: str | Path | None = None,
    provider: str | None = None,
    on_progress: Callable[[str, int, int], None] = lambda task, done, total: None,
) -> ParityReport:
    """Compare an export with the base and the adapter it was made from, and write `parity.json` anew.

    Args:
        directory: The export.
        model: The training base; None for the one the export names.
        adapter: Directory of the adapter; None for the one the export names.
        provider: "cpu" or "cuda"; None for the one it was made for.
        on_progress: Is told the task, how much is done and of how much.

    Raises:
        UsageError: There is no such provider.
        InputError: The export is damaged, or the base or the adapter is not the one it was made from.
    """
    directory = Path(directory)
    if provider not in (None, "cpu", "cuda"):
        raise UsageError("there is no such provider", found=provider, expected="cpu or cuda")
    entries = _read_provenance(directory)
    base_model = model if model is not None else entries["lora_deploy.base_model"]
    scheme = QuantizationScheme.model_validate_json(entries["lora_deploy.quantization"])
    with _naming("--model"):
        base = TrainingBase(base_model, scheme)
    _expect(base.sha256(), entries["lora_deploy.base_sha256"], "base", base.directory, "--model")
    lora = None
    if "lora_deploy.adapter" in entries:
        with _naming("--adapter"):
            lora = read_adapter(adapter if adapter is not None else entries["lora_deploy.adapter"])
        _expect(hash_adapter(lora), entries["lora_deploy.adapter_sha256"], "adapter", lora.source, "--adapter")
    report = check_parity(
        directory,
        base,
        lora,
        precision=entries["lora_deploy.precision"],
        provider=provider or entries["lora_deploy.provider"],
        on_progress=on_progress,
    )
    report.save(directory)
    return report


@contextmanager
def _naming(option: str) -> Iterator[None]:
    """What cannot be read may have moved: its message says how to name the new place."""
    try:
        yield
    except InputError as error:
        hint = f"if it has moved, name the new place with {option}"
        error.details["remedy"] = f"{error.details['remedy']}; {hint}" if "remedy" in error.details else hint
        raise


def _expect(found: str, expected: str, what: str, file: str | Path, option: str) -> None:
    if found != expected:
        raise InputError(
            f"this is not the {what} that the export was made from",
            file=file,
            found=f"sha256 {found[:16]}…",
            expected=f"sha256 {expected[:16]}…",
            remedy=f"name the right one with {option}",
        )


def _read_provenance(directory: Path) -> dict[str, str]:
    """The export's `metadata_props`, after its weights have been found whole."""
    file = directory / "model.onnx"
    if not file.is_file():
        raise CheckpointError("there is no exported model", file=file, remedy="make one with lora-deploy export")
    try:
        model = ir.load(file)
    except Exception as error:
        raise CheckpointError("the exported model is damaged", file=file, found=str(error)) from error
    entries = dict(model.metadata_props)
    if "lora_deploy.data_sha256" not in entries:
        raise CheckpointError("this model was not exported by lora-deploy", file=file)
    expected = entries["lora_deploy.data_sha256"]
    data = directory / f"model-{expected[:12]}.onnx.data"
    if not data.is_file():
        raise CheckpointError("the weights of the export are missing", file=data, remedy="export again")
    digest = hashlib.sha256()
    with open(data, "rb") as opened:
        while piece := opened.read(1 << 24):
            digest.update(piece)
    found = digest.hexdigest()
    if found != expected:
        raise CheckpointError(
            "the weights of the export are damaged", file=data, found=found, expected=expected, remedy="export again"
        )
    return entries
