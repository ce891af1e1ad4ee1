"""A process that has imported everything and forks a child for each command line, so that one costs a second, not ten.

    LD_PRELOAD=shim.so python -m tests.faults.server NAME

It listens on the abstract Unix socket NAME and ends when its standard input does. Nothing is computed before the fork,
and no session of onnxruntime is opened: threads do not survive it. See `tests.faults.forks` for the other end.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import select
import signal
import socket
import sys
import traceback
from pathlib import Path
from typing import Any

__all__ = ["import_everything", "serve"]


def import_everything() -> None:
    """What the commands would import, whichever of them it is."""
    for name in ("bitsandbytes", "mobius", "onnxruntime", "matplotlib.pyplot", "accelerate"):
        importlib.import_module(name)
    for name in ("cli", "export", "verify", "adapter.packing", "train.loop", "train.trainer"):
        importlib.import_module(f"lora_deploy.{name}")


def serve(name: str) -> None:
    """Answer one connection after the other until standard input ends."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that wait
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("\0" + name)
        listening.listen(64)
        print("ready", flush=True)
        while True:
            ready, _, _ = select.select([listening, sys.stdin], [], [])
            if sys.stdin in ready:
                return
            connection, _ = listening.accept()
            if os.fork() == 0:
                listening.close()
                _attend(connection)
            connection.close()


def _attend(connection: socket.socket) -> None:
    """Fork the child of one request, tell its number and then how it ended."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    file = connection.makefile("rw")
    request = json.loads(file.readline())
    child = os.fork()
    if child == 0:
        connection.close()
        file.close()
        _run(request)
    file.write(f"{child}\n")
    file.flush()
    _, status = os.waitpid(child, 0)
    file.write(f"{os.waitstatus_to_exitcode(status)}\n")
    file.flush()
    os._exit(0)


def _run(request: dict[str, Any]) -> None:
    """The command line, as a process of its own would run it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # until the command line is there to answer it
    os.setpgid(0, 0)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    for number, name in ((1, "out"), (2, "err")):
        file = os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(file, number)
        os.close(file)
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    code = 1
    try:
        if request["arm"] is not None:
            prefix, k, mode, error, kinds, log, plain = request["arm"]
            ctypes.CDLL(None).fault_arm(prefix.encode(), ctypes.c_long(k), mode, error, kinds, log.encode(), plain)
        code = _main(request["argv"], Path(request["raised"]))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _main(argv: list[str], raised: Path) -> int:
    from lora_deploy import cli

    app = cli.app

    def recorded(**options: Any) -> Any:
        try:
            return app(**options)
        except BaseException as error:  # main() makes a message and a code of it
            details = sorted(getattr(error, "details", {}))
            raised.write_text(json.dumps({"raised": type(error).__name__, "details": details}), encoding="utf-8")
            raise

    cli.app = recorded  # type: ignore[assignment]
    sys.argv = ["lora-deploy", *argv]
    sys.modules["__main__"].__package__ = ""  # or the messages about usage would name this module
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        cli.main()
    except SystemExit as ended:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        return int(ended.code or 0)
    return 0


if __name__ == "__main__":
    import_everything()
    serve(sys.argv[1])
