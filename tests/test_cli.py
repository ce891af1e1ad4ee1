"""The command line as a whole: quick help, JSON for scripts, silence with --quiet, and one code for each end."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lora_deploy import __version__, cli
from lora_deploy.errors import LoraDeployError, ParityError
from tests.commands import Command, command
from tests.conftest import CheckpointFactory
from tests.export.conftest import adapter_dir

__all__ = ["adapter_dir", "command"]

COMMANDS = ("train", "plan", "export", "verify", "run", "bench", "models", "demo")
REPORT_KEYS = {
    "activation_rounding",
    "bitsandbytes_gap",
    "cases",
    "codes",
    "control_failed",
    "deployment",
    "layers",
    "max_kl",
    "notes",
    "passed",
    "precision",
    "provider",
    "tolerance",
    "versions",
}


def test_help_lists_the_commands_and_imports_nothing_heavy() -> None:
    """In a process of its own, for this one has everything imported already."""
    program = (
        "import sys\n"
        "from lora_deploy.cli import main\n"
        "sys.argv = ['lora-deploy', '--help']\n"
        "try:\n    main()\n"
        "except SystemExit as ended:\n    assert not ended.code, ended.code\n"
        "heavy = {name.partition('.')[0] for name in sys.modules}\n"
        "print('HEAVY', sorted(heavy & {'torch', 'transformers', 'mobius', 'onnxruntime', 'onnx', 'bitsandbytes',\n"
        "    'numpy', 'onnx_ir', 'huggingface_hub', 'peft', 'accelerate'}))\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    for name in COMMANDS:
        assert f" {name} " in ended.stdout
    assert ended.stdout.splitlines()[-1] == "HEAVY []"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_and_every_option_of_it_is_explained(name: str, command: Command) -> None:
    ended = command(name, "--help")
    assert ended.code == 0
    assert "--quiet" in ended.out
    assert "--json" in ended.out
    import typer

    group = typer.main.get_command(cli.app)
    parameters = group.commands[name].params  # type: ignore[attr-defined]
    assert all(getattr(parameter, "help", None) for parameter in parameters if parameter.name != "help")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["nonsense"], "nonsense"),
        (["export"], "--model"),
        (["export", "--model", "m", "--output", "o", "--merge", "--nonsense"], "--nonsense"),
        (["run", "out"], "--prompt"),
        (["run", "out", "--prompt", "x", "--max-new-tokens", "many"], "--max-new-tokens"),
        (["verify"], "OUT"),
    ],
)
def test_a_mistake_in_the_arguments_ends_with_two(arguments: list[str], named: str, command: Command) -> None:
    ended = command(*arguments)
    assert ended.code == 2
    assert ended.out == ""
    assert named in ended.err
    assert "Traceback" not in ended.err


@pytest.fixture
def exporting(checkpoint_dir: CheckpointFactory, adapter_dir: Callable[..., Path], tmp_path: Path) -> list[object]:
    """Arguments of an export that passes."""
    asked = ["--model", checkpoint_dir("llama"), "--adapter", adapter_dir("llama"), "--output", tmp_path / "out"]
    return ["export", "--merge", "--quantization", "nf4", *asked]


def test_json_is_all_of_stdout_and_holds_what_was_made(exporting: list[object], command: Command) -> None:
    ended = command(*exporting, "--json")
    assert ended.code == 0
    printed = json.loads(ended.out)
    output = Path(printed["output"])
    assert printed.keys() == {"output", "bytes", "parity", "warnings", "graph", "kept_base"}
    assert printed["bytes"] == sum(file.stat().st_size for file in output.glob("model*"))
    assert printed["warnings"] == []
    assert printed["graph"] == {"source": "mobius", "reason": "its graph of llama was verified"}
    assert printed["parity"].keys() == REPORT_KEYS
    written = json.loads((output / "parity.json").read_text())
    assert printed["parity"] == {name: written[name] for name in REPORT_KEYS}
    assert written.keys() - REPORT_KEYS == {"model_sha256", "report_sha256"}
    assert printed["parity"]["passed"] is True
    checked = command("verify", output, "--json")
    assert json.loads(checked.out) == printed["parity"]
    assert json.loads(command(*exporting, "--overwrite", "--no-verify", "--json").out)["parity"] is None


def test_json_of_a_failed_check_is_printed_before_the_code_says_so(
    exporting: list[object], command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lora_deploy.verify.tolerances import TOLERANCES, Tolerance

    assert command(*exporting, "--quiet").code == 0
    monkeypatch.setitem(TOLERANCES, "fp32", Tolerance(kl=0.0, top1=1.0, tie_margin=0.0, max_abs=0.0))
    ended = command("verify", exporting[-1], "--json")
    assert ended.code == 4
    assert json.loads(ended.out)["passed"] is False


def test_the_screen_shows_the_table_and_quiet_shows_nothing(exporting: list[object], command: Command) -> None:
    ended = command(*exporting)
    assert ended.code == 0
    for text in (
        "Parity with the trained model",
        "left-padded",
        "tolerance",
        "1e-06",
        "must fail",
        "MB in",
        "report.html",
        str(exporting[-1]),
    ):
        assert text in ended.out.replace("\n", "")
    assert command(*exporting, "--overwrite", "--quiet") == (0, "", "")
    assert command("verify", exporting[-1], "--quiet") == (0, "", "")


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (LoraDeployError("a bug"), 1, "lora-deploy: a bug\n"),
        (ParityError("no", file="f"), 4, "lora-deploy: no\n  file:     f\n"),
        (KeyboardInterrupt(), 130, "lora-deploy: interrupted\n"),
    ],
)
def test_an_error_decides_the_code_and_is_the_whole_message(
    error: BaseException, code: int, message: str, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise error

    monkeypatch.setattr("lora_deploy.integrity.check_files", fail)
    assert command("verify", "out", "--quiet") == (code, "", message)


def test_the_module_runs_as_the_command_does() -> None:
    ended = subprocess.run([sys.executable, "-m", "lora_deploy"], capture_output=True, text=True, check=False)
    assert ended.returncode in (0, 2)
    assert "export" in ended.stdout + ended.stderr
    assert __version__


_IN_A_DESTRUCTOR = """
import signal, sys, time
from lora_deploy import cli

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it

class Slow:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)
        time.sleep(0)

def work(**options):
    Slow()
    time.sleep(600)  # the signal must end this, too

cli.app = work
cli.main()
"""
_AT_THE_END = """
import atexit, os, signal
from lora_deploy import cli

signal.signal(signal.SIGINT, signal.default_int_handler)
atexit.register(lambda: os.kill(os.getpid(), signal.SIGINT))  # runs after what is registered later
cli.app = lambda **options: print("done")
cli.main()
"""


@pytest.mark.parametrize(
    ("code", "ended"),
    [(_IN_A_DESTRUCTOR, (130, "", "lora-deploy: interrupted\n")), (_AT_THE_END, (0, "done\n", ""))],
    ids=["in a destructor", "while the interpreter ends"],
)
def test_ctrl_c_where_python_would_print_it_and_go_on(code: str, ended: tuple[int, str, str]) -> None:
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert (run.returncode, run.stdout, run.stderr) == ended
