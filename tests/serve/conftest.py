"""Exports to serve."""

from __future__ import annotations

from tests.run.conftest import talking, talking_branch, talking_export

__all__ = ["talking", "talking_branch", "talking_export"]
