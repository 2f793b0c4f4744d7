"""Set-user-ID and set-group-ID do not survive that somebody without privileges changes the file's bytes.

Not even if another mount has set them since the file was opened, of which the writer's kernel need not know.
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from outsider import Outsider

if TYPE_CHECKING:
    from conftest import MakeCell

NOBODY = 65534
CHANGES = ["os.pwrite(fd, b'changed', 0)", "os.ftruncate(fd, 3)"]


@pytest.mark.parametrize("change", CHANGES, ids=["write", "truncate"])
@pytest.mark.parametrize(("set_to", "left"), [(0o4777, 0o777), (0o2777, 0o777)], ids=oct)
def test_set_elsewhere_after_the_file_was_opened(make_cell: MakeCell, change: str, set_to: int, left: int) -> None:
    as_root = os.getuid() == 0
    cell = make_cell(mount_options="allow_other" if as_root else "")
    a, b = cell.mountpoint("m1"), cell.mountpoint("m2")
    if as_root:  # the writer will have no token
        command = [sys.executable, "-m", "promisefs_client.cli", "fs", "setacl", str(b), "system:anyuser", "write"]
        subprocess.run(command, check=True, timeout=30)
    (b / "f").write_bytes(b"content")
    (b / "f").chmod(0o666)
    with Outsider() as writer:
        directory = writer.do(f"os.open({str(a)!r}, os.O_RDONLY)")
        if as_root:
            writer.do(f"os.setgroups([]), os.setgid({NOBODY}), os.setuid({NOBODY})")
        writer.do(f"(fd := os.open('f', os.O_RDWR, dir_fd={directory}))")
        (b / "f").chmod(set_to)
        writer.do(change)
        assert os.stat(b / "f").st_mode & 0o7777 == left
        assert writer.do("os.fstat(fd).st_mode & 0o7777") == left


def test_root_keeps_them(make_cell: MakeCell) -> None:
    if os.getuid() != 0:
        pytest.skip("only root keeps them")
    cell = make_cell()
    path = cell.mountpoint("m1") / "f"
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        (cell.mountpoint("m2") / "f").chmod(0o6777)
        os.write(fd, b"x")
        os.fsync(fd)
        assert os.stat(path).st_mode & 0o7777 == 0o6777
    finally:
        os.close(fd)
