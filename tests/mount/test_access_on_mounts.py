"""Rights on real mounts that several users use: root, who runs the server, and somebody without a token."""

from __future__ import annotations

import errno
import mmap
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from outsider import Outsider

if TYPE_CHECKING:
    from conftest import MakeCell

NOBODY = 65534
PROMISEFS = Path(sys.executable).with_name("promisefs")
pytestmark = pytest.mark.skipif(os.getuid() != 0, reason="only root can be two users")

_ERRNO = """
def errno_of(function, *args):
    try:
        function(*args)
    except OSError as error:
        return error.errno
    return 0
def read(fd):
    return os.pread(fd, 100, 0)
"""


def setacl(directory: Path, *pairs: str) -> None:
    subprocess.run([PROMISEFS, "fs", "setacl", directory, *pairs], check=True, timeout=60)


class Nobody(Outsider):
    """A process without a token. Its working directory is a mountpoint, which it could not reach by itself."""

    def __init__(self, root: Path) -> None:
        super().__init__(_ERRNO)
        self.do(f"os.chdir({str(root)!r})")
        self.do(f"os.setgroups([]), os.setgid({NOBODY}), os.setuid({NOBODY})")

    def errno_of(self, call: str) -> int:
        answer = self.do(f"errno_of({call})")
        assert isinstance(answer, int)
        return answer


def test_names_and_attributes_in_the_kernel_are_shown_to_nobody_else(make_cell: MakeCell) -> None:
    cell = make_cell(mounts=1, mount_options="allow_other")
    root = cell.mountpoint("m1")
    setacl(root, "system:anyuser", "l")
    for name in ("secret", "public"):
        (root / name).mkdir(mode=0o700)
        (root / name / "file").write_bytes(b"content")
        (root / name / "file").chmod(0o600)
        setacl(root / name, "system:anyuser", "read" if name == "public" else "none")
    for _ in range(2):  # the kernel has all of it now
        for path in (root / "secret/file", root / "public/file"):
            assert path.stat().st_size == 7 and path.read_bytes() == b"content"
        os.listdir(root / "secret")
    secret, public = "secret", "public"
    with Nobody(root) as nobody:
        assert nobody.do("sorted(os.listdir('.'))") == ["public", "secret"]
        assert nobody.do(f"open({public + '/file'!r}).read()") == "content", "mode bits are the owner's"
        for call in (
            f"os.stat, {secret + '/file'!r}", f"os.stat, {secret + '/nothing'!r}", f"os.listdir, {secret!r}",
            f"os.chdir, {secret!r}", f"os.open, {secret + '/file'!r}, os.O_RDONLY",
            f"os.getxattr, {secret!r}, 'afs.acl'",
            f"os.open, {public + '/file'!r}, os.O_RDWR", f"os.unlink, {public + '/file'!r}",
            f"os.mkdir, {public + '/d'!r}", f"os.setxattr, {public!r}, 'afs.acl', b'0\\n0\\n'",
            f"os.rename, {public + '/file'!r}, {public + '/g'!r}", f"os.chmod, {public + '/file'!r}, 0o777",
        ):  # fmt: skip
            assert nobody.errno_of(call) == errno.EACCES, call
        assert (root / "secret/file").stat().st_size == 7
        assert nobody.errno_of(f"os.stat, {secret + '/file'!r}") == errno.EACCES


def test_a_right_that_is_taken_away_on_another_mount(make_cell: MakeCell) -> None:
    """The first half of the story of 2007: open, mapped, and then not allowed any more."""
    cell = make_cell(mounts=2, mount_options="allow_other")
    one, two = cell.mountpoint("m1"), cell.mountpoint("m2")
    setacl(two, "system:anyuser", "l")
    (two / "d").mkdir()
    setacl(two / "d", "system:anyuser", "write")
    (two / "d/file").write_bytes(b"content".ljust(mmap.PAGESIZE))
    path = "d/file"
    with Nobody(one) as nobody, Nobody(one) as mapper:
        nobody.do(f"(fd := os.open({path!r}, os.O_RDWR))")
        assert nobody.do("read(fd)[:7]") == b"content"
        mapper.do(f"(fd := os.open({path!r}, os.O_RDONLY))")
        mapper.do(f"(m := mmap.mmap(fd, {mmap.PAGESIZE}, prot=mmap.PROT_READ)) and None")
        assert mapper.do("m[0]") == b"content"[0]
        setacl(two / "d", "system:anyuser", "l")
        assert nobody.errno_of(f"os.open, {path!r}, os.O_RDONLY") == errno.EACCES
        assert nobody.errno_of("read, fd") == errno.EACCES
        assert nobody.do(f"os.stat({path!r}).st_size") == mmap.PAGESIZE, "`l` is left"
        mapper.tell("m[0]")
        assert mapper.has_died(30) == signal.SIGBUS
        setacl(two / "d", "system:anyuser", "read")
        assert nobody.do("read(fd)[:7]") == b"content"
        setacl(two / "d", "system:anyuser", "none")
        assert nobody.errno_of(f"os.stat, {path!r}") == errno.EACCES


def test_mode_bits_of_others_count_only_with_posix(make_cell: MakeCell) -> None:
    for options, allowed in (("allow_other", True), ("allow_other,posix", False)):
        cell = make_cell(mounts=1, mount_options=options)
        root = cell.mountpoint("m1")
        root.chmod(0o755)
        setacl(root, "system:anyuser", "write")
        (root / "mine").write_bytes(b"content")
        (root / "mine").chmod(0o600)
        with Nobody(root) as nobody:
            found = nobody.errno_of("os.open, 'mine', os.O_RDWR")
            assert found == (0 if allowed else errno.EACCES)
            assert nobody.errno_of(f"os.chown, 'mine', {NOBODY}, -1") == errno.EPERM
            made = nobody.errno_of("os.mkdir, 'd'")
            assert made == (0 if allowed else errno.EACCES)
        os.chown(root / "mine", 1234, 1234)
        assert os.stat(root / "mine").st_uid == 1234


def test_nobody_gets_in_until_somebody_says_so(make_cell: MakeCell) -> None:
    cell = make_cell(mounts=1, mount_options="allow_other")
    root = cell.mountpoint("m1")
    (root / "file").write_bytes(b"content")
    with Nobody(root) as nobody:
        for call in ("os.listdir, '.'", "os.stat, 'file'", "os.statvfs, '.'"):
            assert nobody.errno_of(call) == errno.EACCES, call
