"""Fixtures of other folders."""

from tests.commands import command
from tests.export.conftest import adapter_dir, branch_export, tiny_export

__all__ = ["adapter_dir", "branch_export", "command", "tiny_export"]
