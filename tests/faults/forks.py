"""Command lines as processes that faults are put into: `faulty.run("export", ..., arm=Fault(...))`.

The processes are forks of one that has imported everything (`tests.faults.server`), below a library that counts the
calls that change files and lets the k-th of them fail (`shim.c`).
"""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["ANY", "REMOVAL", "SPACE", "Call", "Ended", "Fault", "Faulty", "Running", "build_shim", "start_server"]

SPACE, REMOVAL, ATTRIBUTE = 1, 2, 4
ANY = SPACE | REMOVAL | ATTRIBUTE
_MODES = {"once": 0, "staying": 1, "kill": 2, "stop": 3, "interrupt": 4}
_TIMEOUT_S = 300.0


class Fault(NamedTuple):
    """What happens at the k-th call that changes a file under `prefix`; nothing for k = 0, but calls are counted.

    Attributes:
        prefix: The directory.
        k: From 1.
        mode: "once" or "staying" to fail with `error`, from then on; "kill", "stop" or "interrupt" for a signal.
        error: Such as errno.ENOSPC.
        kinds: Which calls count: SPACE (what a full disk refuses), REMOVAL, ANY.
        exchange: Whether two directories can change places, as they can on Linux's own file systems.
    """

    prefix: Path
    k: int = 0
    mode: str = "once"
    error: int = errno.ENOSPC
    kinds: int = ANY
    exchange: bool = True


class Call(NamedTuple):
    """A call that changes a file: libc's name of it, its path, and of a rename or a link the other one."""

    name: str
    path: str
    target: str


class Ended(NamedTuple):
    """How a command ended.

    Attributes:
        code: Its exit code; -9 for SIGKILL.
        out, err: What it printed.
        calls: That changed files under the fault's prefix, the one that the fault was put into last, if it was killed.
        raised: The class of the exception that the command ended with, if any.
        details: The labels of its message: file, tensor, found, expected, remedy.
    """

    code: int
    out: str
    err: str
    calls: list[Call]
    raised: str | None
    details: list[str]


class Running:
    """A command that runs.

    Attributes:
        pid: Its process.
    """

    def __init__(self, connection: socket.socket, directory: Path) -> None:
        self._connection, self._directory = connection, directory
        connection.settimeout(_TIMEOUT_S)
        self._file = connection.makefile("r")
        self.pid = int(self._file.readline())

    def signal(self, number: int) -> None:
        """Send a signal, if the process is still there."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def _state(self) -> str:
        try:
            return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return "X"

    def wait_until_stopped(self) -> bool:
        """Wait for a fault of mode "stop"; False if the process ended before."""
        until = time.monotonic() + _TIMEOUT_S
        while (state := self._state()) not in "TZX":
            if time.monotonic() > until:
                raise TimeoutError
            time.sleep(0.002)
        return state == "T"

    def wait_until_gone(self, seconds: float) -> bool:
        """Wait for its end for a while; False if it still runs."""
        until = time.monotonic() + seconds
        while (state := self._state()) not in "ZX" and time.monotonic() < until:
            time.sleep(0.002)
        return state in "ZX"

    def wait(self) -> Ended:
        """Until it has ended."""
        code = int(self._file.readline())
        self._file.close()
        self._connection.close()
        out, err, log, raised = (self._read(name) for name in ("out", "err", "log", "raised"))
        calls = [Call(*line.split("\t")[1:]) for line in log.splitlines()]
        error = json.loads(raised) if raised else {"raised": None, "details": []}
        return Ended(code, out, err, calls, error["raised"], error["details"])

    def _read(self, name: str) -> str:
        file = self._directory / name
        return file.read_text(encoding="utf-8") if file.exists() else ""


class Faulty:
    """Runs command lines in forks of a server.

    Args:
        name: Of the server's socket.
        directory: For what they print.
    """

    def __init__(self, name: str, directory: Path) -> None:
        self._name, self._directory = name, directory

    def start(
        self,
        *argv: object,
        arm: Fault | None = None,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
    ) -> Running:
        """Start `lora-deploy` with these arguments.

        Args:
            *argv: The arguments.
            arm: A fault; None for no counting either.
            cwd: Working directory; None for this process's.
            env: Changes of the environment.
        """
        place = Path(tempfile.mkdtemp(dir=self._directory))
        request: dict[str, Any] = {name: str(place / name) for name in ("out", "err", "raised")} | {
            "argv": [str(one) for one in argv],
            "env": dict(env or {}),
            "cwd": str(cwd or Path.cwd()),
            "arm": None,
        }
        if arm is not None:
            rule = [str(arm.prefix), arm.k, _MODES[arm.mode], arm.error, arm.kinds]
            request["arm"] = [*rule, str(place / "log"), int(not arm.exchange)]
        connection = socket.socket(socket.AF_UNIX)
        connection.connect("\0" + self._name)
        connection.sendall(json.dumps(request).encode() + b"\n")
        return Running(connection, place)

    def run(
        self,
        *argv: object,
        arm: Fault | None = None,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
    ) -> Ended:
        """As `start`, and wait for its end."""
        return self.start(*argv, arm=arm, cwd=cwd, env=env).wait()


def build_shim(directory: Path) -> Path:
    """Compile the library."""
    library = directory / "shim.so"
    source = Path(__file__).with_name("shim.c")
    command = ["cc", "-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-o", str(library), str(source), "-ldl"]
    subprocess.run(command, check=True)
    return library


@contextmanager
def start_server(shim: Path, directory: Path, hash_seed: int = 0) -> Iterator[Faulty]:
    """A server for as long as it is needed.

    Args:
        shim: The compiled library.
        directory: For what the commands print.
        hash_seed: PYTHONHASHSEED of it and of all its forks.
    """
    name = f"lora-deploy-faults-{os.getpid()}-{hash_seed}"
    changes = {"LD_PRELOAD": str(shim), "PYTHONHASHSEED": str(hash_seed), "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}
    changes |= {"HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
    command = [sys.executable, "-W", "ignore", "-m", "tests.faults.server", name]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ | changes, text=True
    ) as server:
        assert server.stdout is not None
        try:
            assert server.stdout.readline() == "ready\n"
            yield Faulty(name, directory)
        finally:
            server.send_signal(signal.SIGTERM)
