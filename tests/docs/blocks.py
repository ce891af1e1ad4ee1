"""The code blocks of a Markdown file, with what is said of them in comments that readers do not see.

<!-- given: adapter served -->      what must be there before the first block of the file, as tests/docs makes it
<!-- given in Python: ids = ... --> what the Python block that follows finds
<!-- in the background -->          the block that follows is a server, which goes on until the end of the file
<!-- not run: REASON -->            the block that follows is not run, or what else shows that it is right
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

__all__ = ["LANGUAGES", "Block", "given_things", "read_blocks"]

LANGUAGES = ("sh", "python")
_COMMENT = re.compile(
    r"<!--\s*(?P<kind>not run|in the background|given in Python|given)\s*(?::\s*(?P<text>.*?))?\s*-->", re.S
)
_FENCE = re.compile(r"^```(?P<language>\w*)\n(?P<code>.*?)^```$", re.S | re.M)


@dataclass(frozen=True)
class Block:
    """A code block.

    Attributes:
        place: File and line.
        language: "sh", "python", another, or "" for output.
        code: What stands in it.
        not_run: Why it is not run; None where it is.
        background: Whether it is a server.
        prelude: Python that goes before it.
    """

    place: str
    language: str
    code: str
    not_run: str | None
    background: bool
    prelude: str


def read_blocks(file: Path) -> list[Block]:
    """The blocks in order."""
    text, end, blocks = file.read_text(encoding="utf-8"), 0, []
    for found in _FENCE.finditer(text):
        said = {comment["kind"]: comment["text"] or "" for comment in _COMMENT.finditer(text[end : found.start()])}
        end = found.end()
        place = f"{file.name}:{text.count(chr(10), 0, found.start()) + 1}"
        code = found["code"]
        prelude = said.get("given in Python", "")
        blocks.append(Block(place, found["language"], code, said.get("not run"), "in the background" in said, prelude))
    return blocks


def given_things(file: Path) -> list[str]:
    """What must be there before the first block."""
    text = file.read_text(encoding="utf-8")
    return [
        name for comment in _COMMENT.finditer(text) if comment["kind"] == "given" for name in comment["text"].split()
    ]
