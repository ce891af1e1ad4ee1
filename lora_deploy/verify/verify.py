"""Check an export that is there already: its files, where it came from, and what it computes."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lora_deploy.adapter import LoraAdapter, TrainingRecord, read_adapter
from lora_deploy.entries import recorded_adapters, recorded_base, recorded_scheme, recorded_text
from lora_deploy.errors import CheckpointError, InputError, UsageError
from lora_deploy.export.merge import drop_copies, hash_adapter, open_base
from lora_deploy.integrity import MODEL_NAME, base_key, check_files, converted_later, find_adapters
from lora_deploy.manifest import ADAPTER_DIRECTORY, ADAPTER_SUFFIX, Manifest
from lora_deploy.places import find_place, remember_place
from lora_deploy.run.session import Weights, check_weights
from lora_deploy.verify.parity import check_parity
from lora_deploy.verify.report import ParityReport, check_comparison
from lora_deploy.verify.saving import save_verified

__all__ = ["expect_same", "verify"]


def verify(
    directory: str | Path,
    *,
    model: str | Path | None = None,
    adapter: str | Path | Sequence[str] | Mapping[str, str | Path] | None = None,
    provider: str | None = None,
    weights: Weights = "stored",
    data: Path | None = None,
    max_kl: float | None = None,
    checked: Mapping[str, str] | None = None,
    on_progress: Callable[[str, int, int], None] = lambda task, done, total: None,
) -> ParityReport:
    """Compare an export with the base and the adapters it was made from.

    `parity.json` and `report.html` are written anew where all of them are checked.

    Args:
        directory: The export.
        model: The training base; None for the one the export names.
        adapter: Which adapters to check, and where they are if they have moved or were converted later: a directory,
            directories by name, or a list of "NAME" and "NAME=DIR". None for all that the export names.
        provider: "cpu" or "cuda"; None for the one it was made for.
        weights: How weights that are kept as codes run, as `OnnxSession` takes it.
        data: JSONL text to compare deployed with trained weights on; None for the training data, where it is known.
        max_kl: The gate also asks that they differ by no more, in nats a token, on any text; None for no limit.
        checked: What `lora_deploy.integrity.check_files` gave, where it was called just now; None to call it.
        on_progress: Is told the task, how much is done and of how much.

    Raises:
        UsageError: There is no such provider, or adapter, or `max_kl` is negative.
        InputError: The export is damaged, or the base or an adapter is not the one it was made from.
        ParityError: The codes in the export are not the base's, or not those that were made.
    """
    directory = Path(directory)
    if provider not in (None, "cpu", "cuda"):
        raise UsageError("there is no such provider", found=provider, expected="cpu or cuda")
    check_weights(weights)
    check_comparison(data, max_kl)
    entries = check_files(directory) if checked is None else checked
    if entries.get("lora_deploy.task") == "module":
        raise UsageError(
            "this export was made from a torch module in memory, which only Python has",
            found=directory,
            remedy="call lora_deploy.verify_module(directory, module, adapter, example_inputs=...)",
        )
    graph = directory / MODEL_NAME
    scheme = recorded_scheme(recorded_text(entries, "quantization", graph), graph)
    later = converted_later(directory, entries)
    read = _read_adapters(directory, entries, adapter, later)
    base_model = model if model is not None else _find_base(directory, entries)
    with _naming("--model"):
        base = open_base(base_model, scheme, read.values())
    expect_same(base.sha256(), recorded_text(entries, "base_sha256", graph), "base", base.directory, "--model")
    adapters = {name: drop_copies(lora, base) for name, lora in read.items()}
    remember_place(base_key(entries), base.directory)
    _expect_adapters(adapters, entries, later, graph)
    records = [TrainingRecord.load(lora.source) for lora in adapters.values()]
    report = check_parity(
        directory,
        base,
        adapters,
        provider=provider or recorded_text(entries, "provider", graph),
        weights=weights,
        data=data,
        training_data=[record.data for record in records if record is not None],
        max_kl=max_kl,
        on_progress=on_progress,
    )
    recorded = set(recorded_adapters(entries, graph))
    converted = set(find_adapters(directory)) if "lora_deploy.slots" in entries else set()
    unchecked = sorted((recorded | converted) - set(adapters))
    if unchecked:
        report.notes.append(f"not checked: {', '.join(unchecked)}; name one with --adapter NAME=DIR")
    if recorded <= set(adapters):  # else it would say less than what is there
        save_verified(directory, entries, report, {name: lora.source for name, lora in adapters.items()})
    return report


def _read_adapters(
    directory: Path,
    entries: Mapping[str, str],
    given: str | Path | Sequence[str] | Mapping[str, str | Path] | None,
    later: Collection[str],
) -> dict[str, LoraAdapter]:
    """The adapters to check: those that the export names, where they are now, and those that were added later."""
    recorded = recorded_adapters(entries, directory / "model.onnx")
    manifest = Manifest.read(entries, directory / "model.onnx")
    files = find_adapters(directory) if manifest.branch == "hot-swap" else {}
    known = set(recorded) | set(files)
    if given is None:
        places: dict[str, str | Path | None] = dict.fromkeys(recorded)
    elif isinstance(given, Mapping):
        places = dict(given)
    else:
        texts = [given] if isinstance(given, (str, Path)) else given
        places = dict(_name_and_place(text, recorded, known) for text in texts)
    if not places and given is not None:
        raise UsageError("it is not said which adapter to check", expected=", ".join(sorted(known)) or "none")
    adapters = {}
    for name, place in places.items():
        if name not in known or (place is None and name not in recorded):
            remedy = None if name not in known else f"say where it was trained: --adapter {name}=DIR"
            raise UsageError(
                "the export does not know this adapter", found=name, expected=", ".join(sorted(known)), remedy=remedy
            )
        if place is None and name in later:
            raise CheckpointError(
                "an adapter was converted anew since the export",
                file=files[name],
                remedy=f"check it with --adapter {name}=DIR, or export again",
            )
        if manifest.branch == "hot-swap" and name not in files:
            raise CheckpointError(
                "an adapter of the export is missing",
                file=directory / ADAPTER_DIRECTORY / f"{name}{ADAPTER_SUFFIX}",
                remedy="make it again with lora-deploy adapter convert",
            )
        with _naming(f"--adapter {name}=DIR" if manifest.branch else "--adapter"):
            adapters[name] = read_adapter(_find_adapter(name, recorded) if place is None else place)
    return adapters


def _find_base(directory: Path, entries: Mapping[str, str]) -> str | Path:
    """Where the base is: on the hub, or where it was when it was last exported here."""
    graph = directory / MODEL_NAME
    sha256 = recorded_text(entries, "base_sha256", graph)
    place = find_place(base_key(entries)) or recorded_base(entries, graph)
    if place is None:
        raise UsageError(
            "it is not known where the base of this export is",
            expected=f"the base with sha256 {sha256[:16]}…",
            remedy="name its directory with --model",
        )
    return place


def _find_adapter(name: str, recorded: Mapping[str, Mapping[str, str]]) -> Path:
    place = find_place(recorded[name]["sha256"])
    if place is None:
        raise UsageError(
            "it is not known where the adapter of this export is",
            found=name,
            expected=f"the adapter with sha256 {recorded[name]['sha256'][:16]}…",
            remedy=f"name its directory with --adapter {name}=DIR",
        )
    return place


def _expect_adapters(
    adapters: Mapping[str, LoraAdapter], entries: Mapping[str, str], later: Collection[str], graph: Path
) -> None:
    """Those that the export was made from must be what they were; where they are is remembered."""
    for name, recorded in recorded_adapters(entries, graph).items():
        if name in adapters and name not in later:
            lora = adapters[name]
            expect_same(hash_adapter(lora), recorded["sha256"], "adapter", lora.source, "--adapter")
            remember_place(recorded["sha256"], lora.source)


def _name_and_place(
    text: str | Path, recorded: Mapping[str, Any], known: Collection[str]
) -> tuple[str, str | Path | None]:
    """What "NAME", "NAME=DIR" or, where there is only one adapter, "DIR" means."""
    name, separator, place = str(text).partition("=")
    if separator and name in known:
        return name, place
    if str(text) in known and not Path(text).is_dir():
        return str(text), None
    if len(recorded) == 1 and (Path(text).is_dir() or os.sep in str(text)):
        return next(iter(recorded)), text
    raise UsageError(
        "it is not said which adapter this is",
        found=text,
        expected=f"NAME or NAME=DIR, with NAME of {', '.join(sorted(known)) or 'none: the export has no adapters'}",
    )


@contextmanager
def _naming(option: str) -> Iterator[None]:
    """What cannot be read may have moved: its message says how to name the new place."""
    try:
        yield
    except InputError as error:
        hint = f"if it has moved, name the new place with {option}"
        error.details["remedy"] = f"{error.details['remedy']}; {hint}" if "remedy" in error.details else hint
        raise


def expect_same(found: str, expected: str, what: str, file: str | Path, option: str) -> None:
    """Make sure that a hash is the recorded one.

    Args:
        found: The hash.
        expected: The one that the export recorded.
        what: It is of, for the message.
        file: Where that was read.
        option: What names another.

    Raises:
        InputError: They differ.
    """
    if found != expected:
        raise InputError(
            f"this is not the {what} that the export was made from",
            file=file,
            found=f"sha256 {found[:16]}…",
            expected=f"sha256 {expected[:16]}…",
            remedy=f"name the right one with {option}",
        )
