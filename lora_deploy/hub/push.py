"""Push an export or an adapter to the hub, in one commit; what did not pass is not pushed."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_deploy.adapter import TrainingRecord, read_adapter
from lora_deploy.adapter.files import WEIGHTS_NAME
from lora_deploy.adapter.record import RECORD_NAME
from lora_deploy.config import CONFIG_NAME
from lora_deploy.errors import OutputError, ParityError, UsageError
from lora_deploy.export.commit import is_of_export
from lora_deploy.hub.card import MARK, adapter_card, export_card
from lora_deploy.inputs.json_files import read_json
from lora_deploy.integrity import (
    MODEL_NAME,
    REPORT_NAME,
    base_key,
    check_files,
    converted_later,
    export_files,
    find_adapters,
)
from lora_deploy.places import find_place
from lora_deploy.verify.report import ParityReport

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

__all__ = ["Pushed", "push_to_hub"]

CARD_NAME = "README.md"
_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True)
class Pushed:
    """What is on the hub now.

    Attributes:
        url: Of the commit.
        files: Names of the files that were sent.
        warnings: What the user should know.
    """

    url: str
    files: tuple[str, ...]
    warnings: tuple[str, ...]


def push_to_hub(
    directory: str | Path,
    repo_id: str,
    *,
    base_model: str | None = None,
    license: str | None = None,
    private: bool = False,
    api: HfApi | None = None,
) -> Pushed:
    """Push an export, or an adapter in PEFT's format, with a model card.

    Only the files of the export or of the adapter are sent, whatever else is in the directory, and no path of this
    machine. A card on the hub that is not ours is left as it is.

    Args:
        directory: What `lora-deploy export` or `train` wrote.
        repo_id: USER/NAME; it is made where it is not there.
        base_model: The base's id on the hub; None for the one it was loaded by.
        license: As the hub names it; None for the base's.
        private: Make the repository private, if it is made.
        api: The hub; None for the one that is logged in to.

    Raises:
        ParityError: The export's report is not that of a passed check.
        InputError: A file is missing, damaged or of another export.
        UsageError: It is neither an export nor an adapter.
        OutputError: The hub took it not.
    """
    from huggingface_hub import HfApi

    directory, api = Path(directory), api or HfApi()
    if (directory / MODEL_NAME).is_file():
        entries = check_files(directory)
        report = _passed_report(directory)
        known = entries.get("lora_deploy.base_model")
        base = base_model or known or _hub_id(find_place(base_key(entries)), api)
        terms = license or _license_of(find_place(base_key(entries)), base, api)
        unproved = converted_later(directory, entries) - {case.adapter for case in report.cases}
        warnings = [
            f"the adapter {name} was converted after the check and is left out: run lora-deploy verify first"
            for name in sorted(unproved)
        ]
        left_out = {path for name, path in find_adapters(directory).items() if name in unproved}
        files: dict[str, Path | bytes] = {
            str(path.relative_to(directory)): path for path in export_files(directory, entries) if path not in left_out
        }
        card = export_card(directory, repo_id, entries, report, base_model=base, license=terms)
    elif (directory / CONFIG_NAME).is_file():
        read_adapter(directory, lazy=True)  # every tensor is looked at
        place = _base_of_adapter(directory)
        base = base_model or _hub_id(place, api)
        terms = license or _license_of(Path(place) if place else None, base, api)
        warnings = []
        files = _adapter_files(directory, base)
        card = adapter_card(directory, repo_id, base_model=base, license=terms)
    else:
        raise UsageError(
            "this is neither an export nor an adapter",
            found=directory,
            expected=f"a directory with {MODEL_NAME}, or with {CONFIG_NAME}",
        )
    warnings += [] if base else ["the base has no name on the hub that is known: name it with --base-model"]
    warnings += [] if terms else ["the base's licence is not known: name it with --license"]
    return _commit(api, repo_id, files, card, private, warnings)


def _passed_report(directory: Path) -> ParityReport:
    """The report of the export's check, which passed."""
    file = directory / REPORT_NAME
    if not file.is_file():
        raise ParityError(
            "the export was never compared with the trained model, so it is not pushed",
            file=file,
            remedy=f"lora-deploy verify {directory}",
        )
    report = ParityReport.model_validate(read_json(file))
    if not report.passed:
        raise ParityError(
            "the export does not compute what was trained, so it is not pushed", file=file, found=report.failures()
        )
    return report


def _base_of_adapter(directory: Path) -> str | None:
    record = TrainingRecord.load(directory)
    named = (
        record.base_model if record is not None else read_json(directory / CONFIG_NAME).get("base_model_name_or_path")
    )
    return str(named) if named else None


def _adapter_files(directory: Path, base: str | None) -> dict[str, Path | bytes]:
    """The adapter's files, without what they say of this machine's directories."""
    config = read_json(directory / CONFIG_NAME)
    config["base_model_name_or_path"] = base
    files: dict[str, Path | bytes] = {CONFIG_NAME: _dump(config), WEIGHTS_NAME: directory / WEIGHTS_NAME}
    record = TrainingRecord.load(directory)
    if record is not None:
        told = record.model_copy(update={"base_model": base or "unknown", "data": None})
        files[RECORD_NAME] = _dump(told.model_dump())
    return files


def _dump(values: Any) -> bytes:
    return (json.dumps(values, indent=2, sort_keys=True) + "\n").encode()


def _hub_id(place: str | Path | None, api: HfApi) -> str | None:
    """The hub's name of a base: as it was given, if the hub knows it, or as the hub's own cache has it."""
    if place is None:
        return None
    for parent in Path(place).absolute().parents:
        if parent.name.startswith("models--"):
            return parent.name.removeprefix("models--").replace("--", "/", 1)
    if Path(place).exists() or not _REPO_ID.fullmatch(str(place)):
        return None
    try:
        api.model_info(str(place))
    except Exception:  # no such model, or no network: it may be a directory that has gone
        return None
    return str(place)


def _license_of(place: Path | None, base: str | None, api: HfApi) -> str | None:
    """The base's licence: from the card beside it, or from the hub; None where neither says."""
    from huggingface_hub import ModelCard

    try:
        if place is not None and (place / CARD_NAME).is_file():
            found = ModelCard.load(place / CARD_NAME).data.get("license")
        elif base is not None:
            card = api.model_info(base).card_data
            found = card.get("license") if card is not None else None
        else:
            found = None
    except Exception:  # a card that is no card, or no network: the licence is not known
        return None
    return str(found) if isinstance(found, str) else None


def _commit(
    api: HfApi, repo_id: str, files: dict[str, Path | bytes], card: str, private: bool, warnings: list[str]
) -> Pushed:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        if _has_own_card(api, repo_id):
            warnings.append(f"{CARD_NAME} on the hub is not ours, and was left as it is")
        else:
            files = {**files, CARD_NAME: card.encode()}
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            CommitOperationAdd(
                path_in_repo=name, path_or_fileobj=str(content) if isinstance(content, Path) else content
            )
            for name, content in files.items()
        ]
        operations += [CommitOperationDelete(name) for name in _left_over(api, repo_id, files)]
        info = api.create_commit(repo_id, operations, commit_message="Upload with lora-deploy")
    except Exception as error:  # huggingface_hub's, requests' and the disk's have no common base
        raise OutputError(
            "the hub did not take it",
            file=repo_id,
            found=f"{type(error).__name__}: {error}".splitlines()[0][:300],
            remedy="check the name, the network, and `hf auth login`; no file was changed there",
        ) from error
    return Pushed(str(info.commit_url), tuple(files), tuple(warnings))


def _left_over(api: HfApi, repo_id: str, files: Mapping[str, object]) -> list[str]:
    """What an earlier push of an export left that is not of this one: it would be taken for a part of it."""
    if MODEL_NAME not in files:
        return []
    there = [name for name in api.list_repo_files(repo_id) if name not in files]
    return [name for name in there if is_of_export(Path(name))]


def _has_own_card(api: HfApi, repo_id: str) -> bool:
    """Whether there is a card that somebody wrote."""
    if not api.file_exists(repo_id, CARD_NAME):
        return False
    return MARK not in Path(api.hf_hub_download(repo_id, CARD_NAME)).read_text(encoding="utf-8")
