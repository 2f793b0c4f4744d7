"""The places that are measured: a local directory, promisefs mounts, sshfs beside them.

Each has a warm view, which stays, and can give cold views. What "cold" means differs, and the table says so: for
promisefs and sshfs a new mount, which has not seen the data (the server's own page cache stays as it is); for the local
directory files whose pages were given up by posix_fadvise (its names and inodes stay cached by the kernel).
"""

from __future__ import annotations

import getpass
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from cell_lib import mounts, processes
from cell_lib.cell import Cell

from .sshd import Sshd, SshdUnusable

_SSHFS_S = 20.0


class Target(Protocol):
    name: str

    def warm(self) -> Path:
        """The view that stays for the whole run."""

    def other(self) -> Path:
        """A second view of the same files, that stays too; the same as `warm` for the local directory."""

    def cold(self) -> Iterator[Path]:
        """For `cold_view`: yield once a view that has not seen the data."""


@contextmanager
def cold_view(target: Target) -> Iterator[Path]:
    yield from target.cold()


def give_up_pages(directory: Path) -> None:
    """Make the kernel drop its clean pages of all files below."""
    for folder, _, names in os.walk(directory):
        for name in names:
            fd = os.open(os.path.join(folder, name), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                os.fdatasync(fd)
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(fd)


class LocalDirectory:
    name = "local"

    def __init__(self, directory: Path) -> None:
        directory.mkdir()
        self._directory = directory

    def warm(self) -> Path:
        return self._directory

    def other(self) -> Path:
        return self._directory

    def cold(self) -> Iterator[Path]:
        give_up_pages(self._directory)
        yield self._directory


class PromisefsMounts:
    name = "promisefs"

    def __init__(self, cell: Cell) -> None:
        """Take a cell with two mounts."""
        self.cell = cell
        self._made = 2

    def warm(self) -> Path:
        return self.cell.mountpoint("m1")

    def other(self) -> Path:
        return self.cell.mountpoint("m2")

    def cold(self) -> Iterator[Path]:
        self._made += 1
        name = f"m{self._made}"
        mount = self.cell.mount(name)
        try:
            yield mount.mountpoint
        finally:
            self.cell.unmount(name)


class SshfsUnusable(Exception):
    """The message says why."""


class SshfsMounts:
    """sshfs to this machine, with its usual caching. Its files lie in a local directory of their own."""

    name = "sshfs"

    def __init__(self, directory: Path, mark: str) -> None:
        """Make the two views that stay. Raise SshfsUnusable."""
        self._directory = directory
        self._environment = processes.environment(mark)
        self._made = 0
        directory.mkdir()
        (directory / "files").mkdir()
        try:
            self._sshd = Sshd(directory / "sshd", self._environment)
        except (SshdUnusable, subprocess.SubprocessError) as reason:
            raise SshfsUnusable(str(reason)) from None
        try:
            self._views = [self._mount(), self._mount()]
        except BaseException:
            self._sshd.close()
            raise

    def warm(self) -> Path:
        return self._views[0]

    def other(self) -> Path:
        return self._views[1]

    def cold(self) -> Iterator[Path]:
        view = self._mount()
        try:
            yield view
        finally:
            self._unmount(view)

    def close(self) -> None:
        for view in self._views:
            self._unmount(view)
        self._sshd.close()

    def _mount(self) -> Path:
        self._made += 1
        view = self._directory / f"s{self._made}"
        view.mkdir()
        source = f"{getpass.getuser()}@127.0.0.1:{self._directory / 'files'}"
        command = ["sshfs", source, str(view), *self._sshd.options]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_SSHFS_S, check=False, env=self._environment
        )
        if done.returncode:
            raise SshfsUnusable(f"sshfs failed: {done.stderr.strip()}")
        return view

    def _unmount(self, view: Path) -> None:
        subprocess.run(["fusermount3", "-u", str(view)], capture_output=True, timeout=_SSHFS_S, check=False)
        if mount := mounts.fuse_mount_at(view):
            mounts.force_unmount(mount)
