"""Where things lie is remembered outside of exports, and forgotten without harm."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_deploy.places import cache_directory, find_place, remember_place

SHA256 = "0123456789abcdef" * 4


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return cache_directory()


def test_the_last_place_that_is_still_there_is_found(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "sec\nond"
    assert find_place(SHA256) is None
    for place in (first, second):
        place.mkdir()
        remember_place(SHA256, place)
    assert find_place(SHA256) == second
    second.rmdir()
    assert find_place(SHA256) == first
    first.rmdir()
    assert find_place(SHA256) is None


def test_what_is_relative_is_remembered_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    remember_place(SHA256, "file")
    monkeypatch.chdir("/")
    assert find_place(SHA256) == tmp_path / "file"


@pytest.mark.parametrize("sha256", ["", "../../etc/passwd", SHA256.upper(), SHA256 + "0"])
def test_only_a_hash_is_looked_up(sha256: str, tmp_path: Path) -> None:
    remember_place(sha256, tmp_path)
    assert find_place(sha256) is None
    assert not (tmp_path / "cache").exists()


def test_a_cache_that_cannot_be_used_does_no_harm(tmp_path: Path, cache: Path) -> None:
    cache.parent.mkdir()
    cache.write_text("a file")
    remember_place(SHA256, tmp_path)
    assert find_place(SHA256) is None
    cache.unlink()
    (cache / "places").mkdir(parents=True)
    (cache / "places" / SHA256).write_bytes(b"\xff\0relative\0")
    assert find_place(SHA256) is None
