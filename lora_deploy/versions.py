"""Versions of the libraries that a number or a file was made with."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

__all__ = ["installed_versions"]


def installed_versions(*packages: str) -> dict[str, str]:
    """The versions of those packages that are installed, by name."""
    found = {}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
