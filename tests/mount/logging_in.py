"""Users of a cell, and their tokens, by the commands that people use."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from promisefs_client.identity import saved_tokens

PROMISEFSD = [sys.executable, "-c", "from promisefs_server.cli import main; main(prog_name='promisefsd')"]
PROMISEFS = [sys.executable, "-m", "promisefs_client.cli"]
TIMEOUT_S = 60


_AS_ANOTHER_USER = """
import encodings.idna, os, sys
from promisefs_client.cli import main
uid = int(sys.argv.pop(1))
os.setgroups([]), os.setgid(uid), os.setuid(uid)
main()
"""
"""The interpreter may be where that user cannot run it, so it is another one only when all is imported."""


def run(command: list[str], *arguments: str | Path, stdin: str = "") -> str:
    """Return what it says; it must not fail."""
    done = _run([*command, *map(str, arguments)], stdin)
    assert done.returncode == 0, (arguments, done.stderr)
    return done.stdout


def run_as(uid: int, *arguments: str | Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Run promisefs as another user."""
    return _run([sys.executable, "-c", _AS_ANOTHER_USER, str(uid), *map(str, arguments)], stdin)


def _run(command: list[str], stdin: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)


def add_user(store: Path, name: str, *options: str) -> str:
    """Return a token of the new user's."""
    run(PROMISEFSD, "users", "add", store, name, "--no-password", *options)
    return run(PROMISEFSD, "users", "token", store, name)


@contextmanager
def logged_in_at(store: Path, port: int) -> Iterator[None]:
    """Be an administrator at a port that is not the server's own, so that the local rule does not hold there."""
    token = add_user(store, "relayed", "--admin")
    run(PROMISEFS, "login", "--server", f"127.0.0.1:{port}", "--token-file", "-", stdin=token)
    try:
        yield
    finally:
        for server, saved in list(saved_tokens.all_saved()):
            if saved.server == f"127.0.0.1:{port}":
                saved_tokens.forget(server)
