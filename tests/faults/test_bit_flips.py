"""One flipped bit in any file of an export: `verify` refuses it before it computes anything."""

from __future__ import annotations

import importlib
import random
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from lora_deploy.adapter import write_adapter
from lora_deploy.errors import InputError
from lora_deploy.export import export_onnx
from lora_deploy.verify import verify
from tests.conftest import random_adapter, tiny_model
from tests.faults.tally import Tally

KIND = "flipped bit found by verify"
FLIPS = 500
# Everything that lies in the exports; a file of another name fails the test of completeness.
FILES = [
    *(("merge", name) for name in ("model.onnx", "model-*.onnx.data", "config.json", "generation_config.json")),
    *(("merge", name) for name in ("genai_config.json", "parity.json", "tokenizer.json", "tokenizer_config.json")),
    *(("merge", name) for name in ("chat_template.jinja", "report.html")),
    *(("branch", name) for name in ("model.onnx", "model-*.onnx.data", "config.json", "generation_config.json")),
    *(("branch", name) for name in ("genai_config.json", "parity.json", "tokenizer.json", "tokenizer_config.json")),
    *(("branch", name) for name in ("chat_template.jinja", "adapters/one.onnx_adapter", "adapters/two.onnx_adapter")),
    ("branch", "report.html"),
]


class Export(NamedTuple):
    """An export and what it was made from."""

    output: Path
    base: Path
    adapters: dict[str, Path]


class _Computed(Exception):
    """The check of the files let it pass."""


@pytest.fixture(scope="module")
def exports(tiny_base: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Export]:
    """A merged export and one with two adapters, both verified."""
    root, base = tmp_path_factory.mktemp("flips"), Path(tiny_base())
    adapters = {name: root / name for name in ("one", "two")}
    for seed, directory in enumerate(adapters.values()):
        write_adapter(random_adapter(tiny_model("llama"), seed=20 + seed), directory)
    own = {"one": adapters["one"]}
    export_onnx(base, own, output=root / "merge", quantization="nf4")
    export_onnx(base, adapters, output=root / "branch", quantization="nf4", merge=False)
    return {"merge": Export(root / "merge", base, own), "branch": Export(root / "branch", base, adapters)}


@pytest.fixture(autouse=True)
def _nothing_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    def computed(*arguments: Any, **options: Any) -> Any:
        raise _Computed

    monkeypatch.setattr(importlib.import_module("lora_deploy.verify.verify"), "check_parity", computed)


def _is_refused(export: Export) -> bool:
    try:
        verify(export.output, model=str(export.base), adapter=export.adapters)
    except InputError:
        return True
    except _Computed:
        return False
    raise AssertionError


def _flip(export: Export, file: Path, count: int, tally: Tally) -> None:
    """Flip one bit after the other, each back again."""
    whole, places = file.read_bytes(), random.Random(file.name)
    missed = []
    try:
        for _ in range(count):
            bit = places.randrange(8 * len(whole))
            damaged = bytearray(whole)
            damaged[bit // 8] ^= 1 << bit % 8
            file.write_bytes(damaged)
            found = _is_refused(export)
            tally(KIND, found)
            missed += [] if found else [bit]
    finally:
        file.write_bytes(whole)
    assert not missed, f"{len(missed)} of {count} in {file.name}, at bits {missed[:9]}"


def _file(export: Export, pattern: str) -> Path:
    (file,) = export.output.glob(pattern)
    return file


def test_every_file_of_an_export_has_its_flips(exports: dict[str, Export]) -> None:
    for kind, export in exports.items():
        names = [path.relative_to(export.output).as_posix() for path in export.output.rglob("*") if path.is_file()]
        patterns = [pattern for one, pattern in FILES if one == kind]
        assert [name for name in names if not any(fnmatch(name, pattern) for pattern in patterns)] == []
        assert len(names) == len(patterns)


def test_a_whole_export_is_not_refused(exports: dict[str, Export]) -> None:
    for export in exports.values():
        assert not _is_refused(export)


@pytest.mark.parametrize(("kind", "pattern"), FILES)
def test_some_flipped_bits(kind: str, pattern: str, exports: dict[str, Export], tally: Tally) -> None:
    _flip(exports[kind], _file(exports[kind], pattern), 2, tally)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "pattern"), FILES)
def test_many_flipped_bits(kind: str, pattern: str, exports: dict[str, Export], tally: Tally) -> None:
    _flip(exports[kind], _file(exports[kind], pattern), -(-FLIPS // len(FILES)), tally)
