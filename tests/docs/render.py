"""The docstrings of what users import, as pages: `python -m tests.docs.render DIRECTORY`."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

# What is documented for users; what else is public is public between our own packages.
PACKAGES = (
    "lora_deploy",
    "lora_deploy.run",
    "lora_deploy.integrations",
    "lora_deploy.integrations.exporter",
    "lora_deploy.serve",
    "lora_deploy.web",
    "lora_deploy.hub",
    "lora_deploy.bench",
    "lora_deploy.errors",
)


def render(directory: Path) -> None:
    """Write a page for each package.

    Args:
        directory: Where to; it is made.
    """
    import pdoc.render

    for name in PACKAGES:
        package = importlib.import_module(name)
        for public in package.__all__:  # names that are imported when they are first used are looked for in vain
            setattr(package, public, getattr(package, public))
    pdoc.render.configure(docformat="google", show_source=False)
    pdoc.pdoc(*PACKAGES, output_directory=directory)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    render(parser.parse_args().directory)
