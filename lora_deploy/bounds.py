"""What names and sizes can be in what an export says of itself: types that pydantic checks."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field, ValidationError

__all__ = ["AdapterName", "Name", "Row", "Sha256", "Size", "first_fault"]


def _check_plain(name: str) -> str:
    if not name.isprintable() or "\\" in name or ".." in name or name.startswith("/"):
        raise ValueError(f"not a name: {name[:100]!r}")
    return name


# A layer's or a tensor's, which messages show.
Name = Annotated[str, Field(min_length=1, max_length=1000), AfterValidator(_check_plain)]
# As long as the name of a file can be, with what is put around it.
AdapterName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}\z")]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}\z")]
# Rows and columns, and what divides them: a vocabulary of millions, no more, for lists are made of them.
Size = Annotated[int, Field(ge=1, le=1 << 24, strict=True)]
Row = Annotated[int, Field(ge=0, le=1 << 24, strict=True)]


def first_fault(error: ValidationError) -> str:
    """What pydantic says, in a line: where, and what is wrong there."""
    first = error.errors(include_url=False, include_context=False)[0]
    place = ".".join(str(part) for part in first["loc"])
    return f"{place}: {first['msg']}"[:300] if place else first["msg"][:300]
