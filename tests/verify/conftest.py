"""Exports of tiny models and the command that checks them."""

from __future__ import annotations

from tests.commands import command
from tests.export.conftest import adapter_dir, branch_export, tiny_export

__all__ = ["adapter_dir", "branch_export", "command", "tiny_export"]
