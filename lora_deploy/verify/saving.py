"""The report of a check beside the export that it is about, and beside no other."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path

from lora_deploy.errors import OutputError
from lora_deploy.export.commit import locked
from lora_deploy.integrity import SEAL_ENTRY, stem_of
from lora_deploy.manifest import read_metadata
from lora_deploy.pages.parity_page import save_report
from lora_deploy.verify.report import ParityReport

__all__ = ["save_verified"]


def save_verified(
    directory: Path, entries: Mapping[str, str], report: ParityReport, adapters: Mapping[str, str | Path]
) -> None:
    """Write the report of an export that is in its place, where others may write too.

    Args:
        directory: The export.
        entries: The graph's `metadata_props` as they were when the check began.
        report: What was found.
        adapters: As `save_report` takes them.

    Raises:
        OutputError: It could not be written, somebody else is writing there, or the export is another one by now.
    """
    # Where nothing can be made beside it, nobody can replace it either.
    beside = stem_of(Path(os.path.realpath(directory))).parent
    with locked(directory) if os.access(beside, os.W_OK) else nullcontext():
        if read_metadata(directory).get(SEAL_ENTRY) != entries.get(SEAL_ENTRY):
            raise OutputError("the export was replaced while it was checked", file=directory, remedy="verify it again")
        save_report(directory, report, adapters)
