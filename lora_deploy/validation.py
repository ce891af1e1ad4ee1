"""What pydantic says of a bad option, as an error of ours."""

from __future__ import annotations

from pydantic import ValidationError

from lora_deploy.errors import UsageError

__all__ = ["as_usage_error"]


def as_usage_error(error: ValidationError, message: str) -> UsageError:
    """The first fault of options that were validated: which one, what it was, what it may be."""
    first = error.errors()[0]
    return UsageError(
        message,
        found=f"{'.'.join(str(part) for part in first['loc'])} = {first.get('input')!r}",
        expected=first["msg"],
    )
