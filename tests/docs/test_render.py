"""The docstrings of what users import become pages."""

from __future__ import annotations

from pathlib import Path

import pytest

import lora_deploy
from tests.docs.render import PACKAGES, render


def test_every_public_name_has_its_place(tmp_path: Path) -> None:
    pytest.importorskip("pdoc", reason='pip install "lora-deploy[docs]"')
    render(tmp_path)
    page = (tmp_path / "lora_deploy.html").read_text(encoding="utf-8")
    for name in lora_deploy.__all__:
        if name != "__version__":
            # `verify` is a package too, which has the function on a page of its own.
            own = tmp_path / "lora_deploy" / f"{name}.html"
            assert f'id="{name}"' in (own.read_text(encoding="utf-8") if own.is_file() else page)
            assert getattr(lora_deploy, name).__doc__
    assert "What an adapter is: rank, scaling, targets." in page
    assert all((tmp_path / f"{name.replace('.', '/')}.html").is_file() for name in PACKAGES)
