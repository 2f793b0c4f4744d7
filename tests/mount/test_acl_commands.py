"""`promisefs fs` on access control lists, servers and caches, and the attributes behind it."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from conftest import MakeCell, View

PROMISEFS = Path(sys.executable).with_name("promisefs")
FAILED, USAGE, MOUNTPOINT = 1, 2, 3
ADMINISTRATORS = "  system:administrators rlidwka"


def fs(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([PROMISEFS, "fs", *arguments], capture_output=True, text=True, timeout=60)


def done(*arguments: str | Path) -> list[str]:
    result = fs(*arguments)
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout.splitlines()


def test_lists_are_set_here_and_seen_there(cell: View) -> None:
    a, b = cell.both
    (a / "d").mkdir()
    (a / "d/f").write_bytes(b"x")
    assert done("setacl", a / "d", "system:anyuser", "read", "system:authuser", "write") == []
    normal = ["Normal rights:", ADMINISTRATORS, "  system:authuser rlidwk", "  system:anyuser rl"]
    assert done("listacl", b / "d") == [f"Access list for {b / 'd'} is", *normal]
    assert done("la", b / "d/f") == [f"Access list for {b / 'd/f'} is", *normal], "a file uses its directory's"
    done("sa", b / "d", "system:authuser", "wd", "--negative")
    assert done("la", a / "d")[5:] == ["Negative rights:", "  system:authuser dw"]
    (a / "e").mkdir()
    done("copyacl", a / "d", a / "e")
    assert done("la", b / "e")[1:] == done("la", b / "d")[1:]
    done("sa", a / "e", "system:anyuser", "lA", "--clear")
    assert done("la", b / "e")[1:] == ["Normal rights:", "  system:anyuser lA"]
    done("sa", a / "e", "system:anyuser", "none")
    assert done("la", b / "e")[1:] == ["Normal rights:"]
    assert done("gca", b / "e") == [f"Callers access to {b / 'e'} is rlidwka"], "nothing stops administrators"


def test_mistakes_are_said_in_one_line(cell: View, tmp_path: Path) -> None:
    a = cell.a
    (a / "d").mkdir()
    (a / "f").write_bytes(b"")
    before = done("la", a / "d")
    for arguments, code, said in (
        (
            ("sa", a / "d", "no-such-user", "rl"),
            FAILED,
            "there is no user or group of one of these names: no-such-user",
        ),
        (("sa", a / "d", "system:anyuser", "rx"), USAGE, "rights are letters of rlidwkaABCDEFGH"),
        (("sa", a / "d", "system:anyuser"), USAGE, "has no rights"),
        (("sa", a / "d", "alice", "r", "alice", "w"), USAGE, "named twice"),
        (("sa", a / "f", "system:anyuser", "rl"), FAILED, "Not a directory"),
        (("sa", a / "missing", "system:anyuser", "rl"), FAILED, "No such file"),
        (("sa", tmp_path, "system:anyuser", "rl"), MOUNTPOINT, "is not in a promisefs mount"),
        (("la", tmp_path), FAILED, "is not in a promisefs mount"),
        (("gca", "/"), FAILED, "is not in a promisefs mount"),
    ):
        result = fs(*arguments)
        assert (result.returncode, result.stdout) == (code, ""), arguments
        assert said in result.stderr and len(result.stderr.splitlines()) == 1
    assert done("la", a / "d") == before


def test_attributes(cell: View) -> None:
    a, b = cell.both
    (a / "f").write_bytes(b"x")
    os.setxattr(a / "f", "user.x", b"1")
    volume, vnode, uniquifier = (int(part, 16) for part in os.getxattr(b / "f", "afs.fid").decode().split(":"))
    assert volume << 40 | vnode == os.stat(b / "f").st_ino and uniquifier >= 0
    assert os.getxattr(b / "f", "afs.volume") == b"root"
    assert os.getxattr(b / "f", "afs.cell").startswith(b"127.0.0.1:")
    assert os.getxattr(b / "f", "afs.access") == b"rlidwka"
    acl = os.getxattr(b, "afs.acl")
    assert acl.endswith(b"system:administrators\t127\n")
    assert os.listxattr(b / "f") == ["user.x"]
    os.setxattr(a, "afs.acl", b"+\n1\n0\nsystem:authuser\t9\n")
    assert done("la", b)[1:] == ["Normal rights:", ADMINISTRATORS, "  system:authuser rl"]
    os.setxattr(a, "afs.acl", acl)
    assert os.getxattr(b, "afs.acl") == acl
    for name, value, number in (
        ("afs.acl", b"nonsense", errno.EINVAL), ("afs.acl", b"\xff", errno.EINVAL), ("afs.fid", b"", errno.EOPNOTSUPP)
    ):  # fmt: skip
        with pytest.raises(OSError) as refusal:
            os.setxattr(b, name, value)
        assert refusal.value.errno == number
    with pytest.raises(OSError) as refusal:
        os.getxattr(b, "afs.nonsense")
    assert refusal.value.errno == errno.ENODATA


def test_flush_and_checkservers(make_cell: MakeCell) -> None:
    cell = make_cell(mounts=1, server_options=("--lease", "2"), mount_options="timeout=2")
    path = cell.mountpoint("m1") / "f"
    path.write_bytes(b"content")
    with path.open("r+b") as file:
        file.write(b"dirty")
        file.flush()
        done("flush", path, cell.mountpoint("m1"))
        assert path.read_bytes() == b"dirtynt"
    assert done("checkservers", cell.mountpoint("m1")) == ["All servers are running."]
    cell.stop_server(kill=True)
    result = fs("checkservers", cell.mountpoint("m1"))
    assert result.returncode == FAILED
    assert result.stdout == (
        f"These servers unavailable due to network or server problems: 127.0.0.1:{cell.servers[0].port}.\n"
    )
    cell.start_server("--lease", "2")


def test_who_one_is_and_quotas(cell: View) -> None:
    a, b = cell.both
    assert done("whoami", a) == ["local (0), in system:administrators, system:anyuser, system:authuser"]
    try:
        done("setquota", a, "2T")
        heading, line = done("listquota", b)
        assert heading.split() == ["Volume", "Name", "Quota", "Used", "%Used", "Partition"]
        assert line.split()[:2] == ["root", str(2 << 30)] and line.split()[3] == "0%"
    finally:
        done("setquota", a, "0")
    assert done("lq", b)[1].split()[:3] == ["root", "no", "limit"]
    assert fs("setquota", a, "much").returncode == USAGE
