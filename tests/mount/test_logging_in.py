"""Who a mount's calls are made by: users with tokens of their own, and nobody else's."""

from __future__ import annotations

import json
import os
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from logging_in import PROMISEFS, PROMISEFSD, TIMEOUT_S, add_user, run, run_as
from outsider import Outsider

if TYPE_CHECKING:
    from conftest import MakeCell

ALICE, BOB = 64101, 64102

pytestmark = pytest.mark.skipif(os.getuid() != 0, reason="takes two users")


LIST = "os.listdir(os.open('.', os.O_RDONLY, dir_fd=root))"
READ = "os.read(os.open('d/hers', os.O_RDONLY, dir_fd=root), 100)"


def become(user: Outsider, uid: int, directory: Path) -> None:
    """Another user, with the directory open: what is around it may be closed to them."""
    user.do(f"(root := os.open({str(directory)!r}, os.O_PATH))")
    user.do(f"os.setgroups([]), os.setgid({uid}), os.setuid({uid})")


def error_of(user: Outsider, call: str) -> str:
    """The errno that a system call fails with, or what it gives."""
    user.do(
        f"exec('''\ntry:\n    said = {call}\nexcept OSError as error:\n    said = errno.errorcode[error.errno]\n''')"
    )
    return str(user.do("said"))


def logged_in(uid: int, port: int, token: str) -> str:
    done = run_as(uid, "login", "--server", f"127.0.0.1:{port}", "--token-file", "-", stdin=token)
    assert done.returncode == 0, done.stderr
    return done.stdout


def log_out(uid: int) -> None:
    done = run_as(uid, "logout")
    assert done.returncode == 0, done.stderr
    with suppress(OSError):  # it was made for the token
        os.rmdir(f"/tmp/promisefs-{uid}")


@pytest.mark.limit_s(120)
def test_each_user_of_a_mount_has_a_token_of_their_own(make_cell: MakeCell) -> None:
    cell = make_cell(mounts=1, mount_options="allow_other")
    path = cell.mountpoint("m1")
    (path / "d").mkdir()
    (path / "d").chmod(0o777)
    tokens = {uid: add_user(cell.store, name, "--id", str(uid)) for name, uid in (("alice", ALICE), ("bob", BOB))}
    run(PROMISEFS, "fs", "setacl", path, "alice", "read")
    run(PROMISEFS, "fs", "setacl", path / "d", "alice", "write")
    with Outsider("import errno") as alice, Outsider("import errno") as bob:
        become(alice, ALICE, path)
        become(bob, BOB, path)
        assert error_of(alice, LIST) == "EACCES"
        assert str(path) in logged_in(ALICE, cell.port, tokens[ALICE])
        assert error_of(alice, LIST) == "['d']"
        alice.do("(fd := os.open('d/hers', os.O_CREAT | os.O_RDWR, 0o644, dir_fd=root))")
        alice.do("os.write(fd, b'from alice')")
        alice.do("os.fsync(fd)")
        assert (path / "d" / "hers").stat().st_uid == ALICE
        assert error_of(bob, LIST) == "EACCES"
        assert str(path) in logged_in(BOB, cell.port, tokens[BOB])
        assert error_of(bob, READ) == "EACCES"
        shown = json.loads(run_as(BOB, "tokens", "--json").stdout)
        assert [entry["name"] for entry in shown if entry["server"].endswith(str(cell.port))] == ["bob"]
        run(PROMISEFSD, "users", "revoke", cell.store, "alice")
        assert error_of(alice, READ) == "EKEYREVOKED"
        log_out(ALICE)
        log_out(BOB)
        assert error_of(alice, LIST) == "EACCES"
    assert (path / "d" / "hers").read_bytes() == b"from alice", "root's own mount goes on"


@pytest.mark.limit_s(120)
def test_only_the_owner_and_root_may_ask_a_mount_anything_else(make_cell: MakeCell) -> None:
    cell = make_cell(mounts=1, mount_options="allow_other")
    asked = run_as(BOB, "status", cell.mountpoint("m1"))
    assert asked.returncode == 1 and "only uid 0 and root may ask" in asked.stderr


def test_a_mount_without_a_token_says_what_to_do(make_cell: MakeCell, tmp_path: Path) -> None:
    """Through another port than the server's own the local rule does not hold."""
    from relay import Relay

    cell = make_cell(mounts=0)
    place = tmp_path / "m"
    place.mkdir()
    with Relay(cell.port) as relay:
        tried = subprocess.run(
            [*PROMISEFS, "mount", f"127.0.0.1:{relay.port}", str(place)], capture_output=True, text=True,
            timeout=TIMEOUT_S, check=False,
        )  # fmt: skip
    assert tried.returncode == 4 and "promisefs login" in tried.stderr


def test_users_and_groups(make_cell: MakeCell) -> None:
    cell = make_cell(mounts=0)
    server = ("--server", f"127.0.0.1:{cell.port}")

    def pts(*arguments: str) -> str:
        return run(PROMISEFS, "pts", *server, *arguments)

    assert pts("createuser", "alice", "--id", "1001") == "User alice has id 1001\n"
    assert pts("creategroup", "alice:friends", "--owner", "alice") == "group alice:friends has id -205\n"
    pts("adduser", "alice", "alice:friends")
    assert pts("membership", "alice") == "Groups alice (id: 1001) is a member of:\n  alice:friends\n"
    assert pts("membership", "alice:friends") == "Members of alice:friends (id: -205) are:\n  alice\n"
    assert pts("examine", "alice").startswith("Name: alice, id: 1001, owner: system:administrators, creator: local,\n")
    pts("rename", "alice", "alicia")
    assert "alicia:friends" in pts("listentries", "--groups")
    pts("removeuser", "alicia", "alicia:friends")
    pts("delete", "alicia:friends", "alicia")
