"""The fixtures of the exports."""

from tests.export.conftest import adapter_dir

__all__ = ["adapter_dir"]
