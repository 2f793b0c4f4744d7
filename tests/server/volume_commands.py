"""Running promisefsd's commands: each in a process of its own, forked from one that has imported everything."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import sys
import tempfile
from pathlib import Path

TIMEOUT_S = 60
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["promisefs_server.cli", "pytest"])


def run(*arguments: str) -> tuple[int, str, str]:
    """Run promisefsd with nobody to ask. Return (exit status, stdout, stderr)."""
    return _run(arguments, None)


def run_and_die(module: str, function: str, number: int, *arguments: str) -> bool:
    """Run promisefsd; it is killed at the end of the n-th call of a function. Return whether it came to that."""
    status, _, stderr = _run(arguments, (module, function, number))
    assert status in (0, -signal.SIGKILL), stderr
    return status != 0


def _run(arguments: tuple[str, ...], death: tuple[str, str, int] | None) -> tuple[int, str, str]:
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, "stdout"), Path(folder, "stderr")]
        process = _CONTEXT.Process(target=_main, args=(arguments, death, [str(path) for path in files]))
        process.start()
        process.join(TIMEOUT_S)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise AssertionError(f"{arguments} did not end")
        status = process.exitcode
        process.close()
        stdout, stderr = [path.read_text() if path.exists() else "" for path in files]
    assert "Traceback" not in stderr, stderr
    return status, stdout, stderr


def _main(arguments: tuple[str, ...], death: tuple[str, str, int] | None, files: list[str]) -> None:
    """What the forked process does."""
    for descriptor, path in ((1, files[0]), (2, files[1])):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdin, sys.stdout, sys.stderr = (open(number, mode, closefd=False) for number, mode in enumerate("rww"))
    if death is not None:
        _die_at(*death)
    from promisefs_server.cli import main

    try:
        main(arguments, prog_name="promisefsd")
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _die_at(module: str, function: str, number: int) -> None:
    """Replace a function of the server's by one that kills this process at the end of its n-th call."""
    owner: object = importlib.import_module(f"promisefs_server.{module}")
    *path, name = function.split(".")
    for part in path:
        owner = getattr(owner, part)
    real = getattr(owner, name)
    left = number

    def dying(*arguments: object, **options: object) -> object:
        nonlocal left
        result = real(*arguments, **options)
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, dying)
