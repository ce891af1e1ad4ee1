"""Every file of an export is the one that was written: hashes in the graph, and a seal on the graph itself.

`model.onnx` records the SHA-256 of every other file in its `metadata_props`, and its own, taken with zeros in the
place of the digest. `parity.json` and `report.html`, which `verify` writes anew, carry such seals too, and name what
they are about: the graph, and the page also the report. A seal finds damage and mistakes. It is no signature: who can
write the files can make it anew.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path

from lora_deploy.entries import FILES_ENTRY, recorded_files
from lora_deploy.errors import CheckpointError
from lora_deploy.manifest import ADAPTER_DIRECTORY, ADAPTER_SUFFIX, Manifest, read_metadata

__all__ = [
    "DATA_PATTERN",
    "FILES_ENTRY",
    "MODEL_NAME",
    "MOVING",
    "OWN_PATTERN",
    "PAGE_NAME",
    "REPORT_NAME",
    "SEAL_ENTRY",
    "SIDE_FILES",
    "TOKENIZER_FILES",
    "UNSEALED",
    "base_key",
    "check_files",
    "converted_later",
    "export_files",
    "find_adapters",
    "hash_file",
    "seal_bytes",
    "seal_of",
    "stem_of",
]

MODEL_NAME, REPORT_NAME, PAGE_NAME = "model.onnx", "parity.json", "report.html"
# What a tokenizer or its chat template may be made of; onnxruntime-genai and optimum read the same files.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
)
# What an export may hold beside the graphs, their data and the report.
SIDE_FILES = ("config.json", "generation_config.json", "genai_config.json", *TOKENIZER_FILES)
# What a writer has inside an output where it has no place beside it: its lock, and what it stages.
OWN_PATTERN = ".lora-deploy.*"
# In the staging directory while files are moved one by one.
MOVING = "moving"
DATA_PATTERN = "model-*.onnx.data"

SEAL_ENTRY = "lora_deploy.model_sha256"
UNSEALED = "0" * 64
_HEX = rb"[0-9a-f]{64}"
_SEALS = {
    # A metadata entry in protobuf: the key, then field 2 (0x12) of 64 bytes (0x40).
    MODEL_NAME: re.compile(re.escape(SEAL_ENTRY.encode()) + rb"\x12\x40(" + _HEX + rb")"),
    REPORT_NAME: re.compile(rb'"report_sha256": "(' + _HEX + rb')"'),
    PAGE_NAME: re.compile(rb'<meta name="lora-deploy:page_sha256" content="(' + _HEX + rb')">'),
}
_NAMES_SEAL = '<meta name="lora-deploy:{}_sha256" content="{}">'
_PIECE = 1 << 22


def stem_of(output: Path) -> Path:
    """What the names of a writer's lock and staging directory begin with: beside the output, or, where nothing can be
    written or renamed there, inside."""
    if output.is_dir() and (os.path.ismount(output) or not os.access(output.parent, os.W_OK | os.X_OK)):
        return output / OWN_PATTERN.removesuffix(".*")
    return output.parent / f".{output.name}"


def hash_file(file: Path) -> str:
    """The SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(file, "rb") as opened:
        while piece := opened.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()


def seal_bytes(name: str, content: bytes) -> bytes:
    """The content of a graph, report or page, with its own SHA-256 in the place of the zeros.

    Args:
        name: `MODEL_NAME`, `REPORT_NAME` or `PAGE_NAME`.
        content: Holds `UNSEALED` in the place of its seal, once.
    """
    (place,) = _SEALS[name].finditer(content)
    assert place[1] == UNSEALED.encode()
    return content[: place.start(1)] + hashlib.sha256(content).hexdigest().encode() + content[place.end(1) :]


def seal_of(name: str, content: bytes) -> str | None:
    """The seal of a graph, report or page, if it has one and it is whole."""
    places = list(_SEALS[name].finditer(content))
    if len(places) != 1:
        return None
    start, end = places[0].span(1)
    unsealed = content[:start] + UNSEALED.encode() + content[end:]
    seal = content[start:end].decode()
    return seal if hashlib.sha256(unsealed).hexdigest() == seal else None


def check_files(directory: Path) -> dict[str, str]:
    """Make sure that every file of an export is the one that was written.

    An adapter may have been converted later: then it has its own seal, and must be for this graph.

    Args:
        directory: The export.

    Returns:
        The graph's `metadata_props`.

    Raises:
        InputError: A file is missing, damaged, or of another export.
    """
    from lora_deploy.run.adapter_files import read_onnx_adapter
    from lora_deploy.run.adapter_seal import check_sealed

    file = directory / MODEL_NAME
    stem = stem_of(Path(os.path.realpath(directory)))
    if (stem.with_name(f"{stem.name}.staging") / MOVING).exists():
        raise CheckpointError(
            "an export into this directory was broken off between its files",
            file=directory,
            remedy="export again with --overwrite",
        )
    entries = read_metadata(directory)
    if FILES_ENTRY not in entries:
        raise CheckpointError("this model was not exported by lora-deploy", file=file)
    seal = seal_of(MODEL_NAME, file.read_bytes())
    if seal is None:
        raise CheckpointError(
            "the graph of the export is damaged, or was changed after the export",
            file=file,
            expected=f"the bytes that its own {SEAL_ENTRY} is of",
            remedy="export again",
        )
    recorded = recorded_files(entries, file)
    for name, sha256 in recorded.items():
        if not _is_adapter(name):
            _check_file(directory / name, sha256)
    for name in SIDE_FILES:
        if os.path.lexists(directory / name) and name not in recorded:
            raise CheckpointError(
                "a file is not of this export, and would be read with it", file=directory / name, remedy="remove it"
            )
    report, page = directory / REPORT_NAME, directory / PAGE_NAME
    checked = _check_report(report, seal) if report.is_file() else None
    if page.is_file():
        _check_page(page, seal, checked)
    adapters = find_adapters(directory)
    for name in sorted(converted_later(directory, entries)):
        check_sealed(adapters[name])
        read_onnx_adapter(adapters[name], Manifest.read(entries, file))
    return entries


def find_adapters(directory: Path) -> dict[str, Path]:
    """The adapter files of an export, by name."""
    files = sorted((directory / ADAPTER_DIRECTORY).glob(f"*{ADAPTER_SUFFIX}"))
    files = [file for file in files if file.is_file() and not file.name.startswith(".")]
    return {file.name.removesuffix(ADAPTER_SUFFIX): file for file in files}


def export_files(directory: Path, entries: Mapping[str, str]) -> list[Path]:
    """The files of an export: those that its graph records, the graph, the report, its page, and all adapters.

    Args:
        directory: The export.
        entries: The graph's `metadata_props`.
    """
    names = {MODEL_NAME, REPORT_NAME, PAGE_NAME, *recorded_files(entries, directory / MODEL_NAME)}
    found = {directory / name for name in names if (directory / name).is_file()}
    return sorted(found | set(find_adapters(directory).values()))


def converted_later(directory: Path, entries: Mapping[str, str]) -> set[str]:
    """The adapters whose files are not those of the export, by name.

    Args:
        directory: The export.
        entries: The graph's `metadata_props`.
    """
    recorded = recorded_files(entries, directory / MODEL_NAME)
    files = find_adapters(directory).items()
    return {name for name, file in files if recorded.get(f"{ADAPTER_DIRECTORY}/{file.name}") != hash_file(file)}


def base_key(entries: Mapping[str, str]) -> str:
    """What `lora_deploy.places` knows an export's base by: its weights and its configuration.

    Args:
        entries: The graph's `metadata_props`.
    """
    config = recorded_files(entries, MODEL_NAME).get("config.json", "")
    return hashlib.sha256(f"{entries.get('lora_deploy.base_sha256', '')}\n{config}".encode()).hexdigest()


def _is_adapter(name: str) -> bool:
    return name.startswith(f"{ADAPTER_DIRECTORY}/") and name.endswith(ADAPTER_SUFFIX)


def _check_file(file: Path, sha256: str) -> None:
    if not file.is_file():
        raise CheckpointError("a file of the export is missing", file=file, remedy="export again")
    found = hash_file(file)
    if found != sha256:
        raise CheckpointError(
            "a file of the export is damaged, or was changed after the export",
            file=file,
            found=f"sha256 {found[:16]}…",
            expected=f"sha256 {sha256[:16]}…",
            remedy="export again",
        )


def _check_report(report: Path, seal: str) -> str:
    """Returns the report's own seal."""
    content = report.read_bytes()
    own = seal_of(REPORT_NAME, content)
    if own is None:
        raise CheckpointError(
            "the parity report is damaged, or was changed after the check",
            file=report,
            expected="the bytes that its own report_sha256 is of",
            remedy="remove it, and verify again",
        )
    if f'"model_sha256": "{seal}"'.encode() not in content:
        raise CheckpointError(
            "the parity report is of another export",
            file=report,
            expected=f"model_sha256 {seal[:16]}…",
            remedy="remove it, and verify again",
        )
    return own


def _check_page(page: Path, seal: str, report: str | None) -> None:
    content = page.read_bytes()
    if seal_of(PAGE_NAME, content) is None:
        raise CheckpointError(
            "the page of the parity report is damaged, was changed, or is not of lora-deploy",
            file=page,
            expected="the bytes that its own page_sha256 is of",
            remedy="remove it, and verify again",
        )
    for name, what, expected in (("model", "export", seal), ("report", "report", report)):
        if expected is not None and _NAMES_SEAL.format(name, expected).encode() not in content:
            raise CheckpointError(
                f"the page of the parity report is of another {what}",
                file=page,
                expected=f"{name}_sha256 {expected[:16]}…",
                remedy="remove it, and verify again",
            )
