"""Fixtures of other folders."""

from tests.commands import command
from tests.export.conftest import adapter_dir

__all__ = ["adapter_dir", "command"]
