"""The benchmarks' own tools: what is counted, in which order, and what is written of it."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from tests.benchmarks import __main__ as program
from tests.benchmarks.export_peers import PEERS, PRECISIONS, export_command
from tests.benchmarks.processes import Ended, Entry, compare, run_process, take_turns, write_entries
from tests.benchmarks.results import Results, format_number, write_results

MEGABYTES = 64
ENTRIES: dict[str, Entry] = {
    "time": {"ours": 2.0, "peer": 4.0, "ratio": 0.5, "unit": "s"},
    "alone": {"ours": 12345.6, "peer": None, "ratio": None, "unit": "MB"},
}
_RIVALS = [(peer, precision) for peer, precisions in PEERS.items() for precision in precisions]


def test_a_process_is_timed_and_its_own_peak_is_found() -> None:
    """This process is larger than both; the kernel would hand its peak on."""
    small = run_process([sys.executable, "-c", "import time; time.sleep(0.2); print('done')"])
    large = run_process([sys.executable, "-c", f"bytearray(b'x' * ({MEGABYTES} << 20))"])
    assert small.seconds > 0.2
    assert small.output == "done\n"
    assert small.peak_bytes < MEGABYTES << 20 < large.peak_bytes < small.peak_bytes + (3 * MEGABYTES << 20)


def test_a_process_that_fails_is_no_number() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)ended with 3.*why not"):
        run_process([sys.executable, "-c", "import sys; print('why not', file=sys.stderr); sys.exit(3)"])
    with pytest.raises(RuntimeError, match="FileNotFoundError"):
        run_process(["a-program-that-is-not-there"])


def test_programs_take_turns() -> None:
    order: list[str] = []

    def action(name: str) -> Ended:
        order.append(name)
        return Ended(float(len(order)), 0, "")

    found = take_turns({"a": lambda: action("a"), "b": lambda: action("b")}, 3)
    assert order == ["a", "b"] * 3
    assert [ended.seconds for ended in found["b"]] == [2, 4, 6]


def test_a_ratio_is_of_runs_beside_each_other(tmp_path: Path) -> None:
    entry = compare([1, 10, 100], [2, 40, 100], "s")
    assert entry == {"ours": 10, "peer": 40, "ratio": 0.5, "unit": "s"}  # 10 / 40 would be of the medians
    assert compare([3, 1, 2], None, "s") == {"ours": 2, "peer": None, "ratio": None, "unit": "s"}
    write_entries({"one": entry}, tmp_path / "file.json")
    assert json.loads((tmp_path / "file.json").read_text()) == {"one": entry}


def test_results_are_a_table_a_picture_and_stay_for_the_next_command(tmp_path: Path) -> None:
    machine: dict[str, str | int] = {"processor": "a Processor", "cores": 2, "memory_bytes": 25 * 10**9, "system": "L"}
    results = Results({"export": ENTRIES}, {"python": "3.11"}, machine)
    write_results(results, tmp_path)
    assert Results.read(tmp_path) == results
    table = (tmp_path / "results.md").read_text()
    assert "| time | 2 | 4 | 0.5 | s |" in table
    assert "| alone | 12,346 |  |  | MB |" in table
    assert "a Processor, 2 cores, 25 GB" in table
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")
    assert format_number(0.0012345) == "0.00123"


def test_a_part_that_fails_is_named_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run_part(part: str, *arguments: object) -> dict[str, Entry]:
        if part == "decode":
            raise RuntimeError("no such peer")
        return ENTRIES

    monkeypatch.setattr(program, "run_part", run_part)
    monkeypatch.setattr(program, "fetch_smollm2", lambda directory: directory)
    asked = ["--work", str(tmp_path)]
    assert program.main([*asked, "--part", "decode", "--part", "branch"]) == 1
    assert "decode: no such peer" in capsys.readouterr().err
    assert program.main([*asked, "--part", "export"]) == 0
    assert Results.read(tmp_path).parts == {"branch": ENTRIES, "export": ENTRIES}
    assert {"python", "onnxruntime"} <= Results.read(tmp_path).versions.keys()


def test_a_part_is_a_program_that_writes_what_it_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "commands", lambda *asked: [("lora_deploy", "models")])
    assert program.run_part("export", tmp_path, tmp_path, True) == {}  # an export that is needed measures nothing
    (tmp_path / "alone.py").write_text(
        "import pathlib, sys\nassert sys.argv[1] == '--json'\n"
        """pathlib.Path(sys.argv[2]).write_text('{"help": {"ours": 0.2, "unit": "s"}}')\n"""
    )
    monkeypatch.setattr(program, "_HERE", "alo")
    monkeypatch.setattr(program, "commands", lambda *asked: [("alone",)])
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    found = program.run_part("startup", tmp_path, tmp_path, True)
    assert found == {"help": {"ours": 0.2, "peer": None, "ratio": None, "unit": "s"}}
    monkeypatch.setattr(program, "commands", lambda *asked: [("alone_nowhere",)])
    with pytest.raises(RuntimeError, match="No module named"):
        program.run_part("export", tmp_path, tmp_path, True)


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("part", program.PARTS)
def test_every_part_ends_with_what_measures(part: str, quick: bool) -> None:
    found = program.commands(part, Path("model"), Path("work"), quick)
    assert found[-1][0].startswith("tests.benchmarks.")
    assert not (quick and "8b" in found[-1])


@pytest.mark.parametrize(("maker", "precision"), [("ours", one) for one in PRECISIONS] + _RIVALS)
def test_every_exporter_is_asked_for_the_same(maker: str, precision: str) -> None:
    command = [str(part) for part in export_command(maker, Path("m"), Path("a"), precision, Path("o"))]
    assert {"m", "o"} <= set(command)
    assert precision in command or maker == "mobius"
    assert ("a" in command) == (maker == "ours")
