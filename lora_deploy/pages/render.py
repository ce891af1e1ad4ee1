"""Templates become pages: one file each, without scripts, that asks nobody for anything.

What comes from files (names, notes, logs) is escaped by jinja2, in SVG too, and the page's own policy forbids the
browser to run or to load anything, should something be missed.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from lora_deploy.pages.scales import short

__all__ = ["render"]


@lru_cache(maxsize=1)
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("lora_deploy.pages"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["short"] = short
    return environment


def render(template: str, **values: Any) -> bytes:
    """A page as UTF-8.

    Args:
        template: Name of a file in `templates`.
        values: What it shows.
    """
    return _environment().get_template(template).render(**values).encode("utf-8", "replace")
