"""Every hostile file through the command line: exit 3, one message, nothing changed, little time and memory."""

from __future__ import annotations

import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from tests.attacks.make import CONFIGURATIONS, HEADERS, INDEXES, make
from tests.commands import assert_one_message, tree
from tests.faults.conftest import Place, adapter_dir, command, place
from tests.faults.tally import Tally

__all__ = ["adapter_dir", "command", "place"]

HERE = Path(__file__).parent
MODEL, INDEX, CONFIG, ADAPTER = (
    "model.safetensors",
    "model.safetensors.index.json",
    "config.json",
    "adapter_model.safetensors",
)


def _refused(place: Place, tally: Tally, kind: str, *named: object) -> None:
    before = tree(place.root)
    ended = place.export()
    tally(kind, ended.code == 3 and tree(place.root) == before)
    assert_one_message(ended, 3, *named)
    assert tree(place.root) == before


def test_the_files_are_what_the_script_makes(tmp_path: Path) -> None:
    make(tmp_path)
    for made in (path for path in tmp_path.rglob("*") if path.is_file()):
        assert made.read_bytes() == (HERE / made.relative_to(tmp_path)).read_bytes()
        assert made.stat().st_size <= 4096
    for folder in ("headers", "indexes", "configurations"):
        assert {path.name for path in (HERE / folder).iterdir()} == {
            path.name for path in (tmp_path / folder).iterdir()
        }


@pytest.mark.parametrize("name", HEADERS)
@pytest.mark.parametrize("side", ["model", "adapter"])
def test_a_hostile_header_is_refused(name: str, side: str, place: Place, tally: Tally) -> None:
    file = place.base / MODEL if side == "model" else place.adapter / ADAPTER
    shutil.copyfile(HERE / "headers" / f"{name}.safetensors", file)
    _refused(place, tally, "hostile header", "truncated or damaged", file, HEADERS[name][1])


@pytest.mark.parametrize("name", INDEXES)
def test_a_hostile_index_is_refused(name: str, place: Place, tally: Tally) -> None:
    (place.base / MODEL).unlink()
    shutil.copyfile(HERE / "indexes" / f"{name}.json", place.base / INDEX)
    _refused(place, tally, "hostile index", place.base / INDEX, INDEXES[name][1])


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_hostile_configuration_is_refused(name: str, place: Place, tally: Tally) -> None:
    shutil.copyfile(HERE / "configurations" / f"{name}.json", place.base / CONFIG)
    _refused(place, tally, "hostile configuration", place.base / CONFIG, CONFIGURATIONS[name][1])


def _links_out(place: Place, name: str) -> None:
    outside = place.root / "outside"
    outside.mkdir()
    file = place.adapter / name if name == ADAPTER else place.base / name
    shutil.move(file, outside / name)
    file.symlink_to(outside / name)


@pytest.mark.parametrize("name", [MODEL, CONFIG, ADAPTER])
def test_a_link_that_leads_out_is_refused(name: str, place: Place, tally: Tally) -> None:
    _links_out(place, name)
    _refused(place, tally, "hostile link", "leads out of its directory", name, "put a copy of the file")


# The command, and at its end what it took: the highest memory in kB, seconds of a processor, and whether torch came.
_MEASURED = """
import atexit, sys, time
def report():
    peak = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
    print(peak, time.process_time(), int("torch" in sys.modules))
atexit.register(report)
from lora_deploy.cli import main
main()
"""
_ATTACKS = ("headers/nested", "headers/overlap", "indexes/climbs-out", "configurations/billion-layers")


def _measure(place: Place) -> None:
    """Export in another process, which must end with 3 in two seconds and 200 MB.

    Programs on the same core slow each other down, in processor time too: the quickest of three counts.
    """
    arguments = ["export", "--merge", "--quiet", "--quantization", "nf4", "--model", str(place.base)]
    arguments += ["--adapter", str(place.adapter), "--output", str(place.output)]
    command = [sys.executable, "-c", _MEASURED, *arguments]
    taken: list[float] = []
    while not taken or (len(taken) < 3 and min(taken) >= 2):
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        assert ended.returncode == 3, ended.stderr
        peak, seconds, torch = ended.stdout.split()
        assert int(peak) < 200 << 10
        assert torch == "0"
        taken.append(float(seconds))
    assert min(taken) < 2


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
@pytest.mark.parametrize("attack", _ATTACKS)
def test_a_refusal_costs_two_seconds_and_200_mb_at_most(attack: str, place: Place) -> None:
    folder, name = attack.split("/")
    if folder == "indexes":
        (place.base / MODEL).unlink()
    taken_as = {"headers": MODEL, "indexes": INDEX, "configurations": CONFIG}[folder]
    shutil.copyfile(next((HERE / folder).glob(f"{name}.*")), place.base / taken_as)
    _measure(place)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_the_costliest_header_costs_two_seconds_and_200_mb_at_most(place: Place) -> None:
    """As many names as are let through to the parser, each as long as the cap allows."""
    raw = b"{" + b",".join(b'"%020d":1' % number for number in range(410_000)) + b"}"
    (place.base / MODEL).write_bytes(struct.pack("<Q", len(raw)) + raw)
    _measure(place)
