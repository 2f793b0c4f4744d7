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


def run(command: list[str], *arguments: str | Path, uid: int | None = None, stdin: str = "") -> str:
    """Run it, as another user if need be. Return what it says; it must not fail."""
    done = subprocess.run(
        [*command, *map(str, arguments)], input=stdin, capture_output=True, text=True, timeout=TIMEOUT_S, check=False,
        user=uid, group=uid, extra_groups=None if uid is None else [],
    )  # fmt: skip
    assert done.returncode == 0, (arguments, done.stderr)
    return done.stdout


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
