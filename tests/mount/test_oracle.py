"""Random operations on two mounts and on a local directory: everything that can be observed is the same.

Each step picks one of the mounts. Guarantees concern what is stored: before a step looks through one mount, files
written through the other are fsynced, as an application would. Everything else is compared at once: results, errno,
contents, stat fields, listings, xattrs, symlink targets. Not compared: blocks on disk, access and change times, and
modification times that nobody set (only that they are of today).

PROMISEFS_ORACLE_EXAMPLES=N runs N random histories, and shrinks what fails; the default run is always the same one.
"""

from __future__ import annotations

import mmap
import os
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test
from trees import RENAME_EXCHANGE, RENAME_NOREPLACE, bytes_for, renameat2

if TYPE_CHECKING:
    from conftest import View

CHOSEN = os.environ.get("PROMISEFS_ORACLE_EXAMPLES")
EXAMPLES = int(CHOSEN or 150)
STEPS = 40
LIMIT_S = max(240, EXAMPLES * 2)
LONG_AGO_NS = 10**18
"""Times that the test sets are before this moment in 2001, times that an operation leaves are after it."""
HANDLES = 4

Result = tuple[object, ...]
Operation = Callable[[bytes], object]
"""What to do in a directory, given its path."""


@dataclass
class Handle:
    """One open file description on a mount, and its twin in the local directory."""

    mount: int
    fd: int
    local_fd: int
    writable: bool
    dirty: bool = False


def outcome(operation: Callable[[], object]) -> Result:
    try:
        return ("done", operation())
    except OSError as error:
        return ("errno", error.errno)


def seen_status(st_: os.stat_result) -> Result:
    is_dir = stat.S_ISDIR(st_.st_mode)
    size = None if is_dir else st_.st_size
    mtime = st_.st_mtime_ns if st_.st_mtime_ns < LONG_AGO_NS else "recent"
    return (oct(st_.st_mode), st_.st_nlink, st_.st_uid, st_.st_gid, size, mtime)


def seen_entry(path: bytes) -> Result:
    """All there is to see of a name without following it."""
    status = os.lstat(path)
    seen: Result = seen_status(status)
    if stat.S_ISLNK(status.st_mode):
        return (*seen, os.readlink(path))
    xattrs = [(name, os.getxattr(path, name)) for name in sorted(os.listxattr(path)) if name.startswith("user.")]
    if stat.S_ISDIR(status.st_mode):
        return (*seen, xattrs, sorted(os.listdir(path)))
    with open(path, "rb") as file:
        return (*seen, xattrs, file.read())


def seen_tree(root: bytes) -> dict[bytes, Result]:
    """`seen_entry` of everything below, and which names are one file."""
    found: dict[bytes, Result] = {b".": seen_entry(root)}
    groups: dict[tuple[int, int], list[bytes]] = {}
    for folder, folders, files in os.walk(root):
        for name in [*folders, *files]:
            path = os.path.join(folder, name)
            status = os.lstat(path)
            relative = os.path.relpath(path, root)
            groups.setdefault((status.st_dev, status.st_ino), []).append(relative)
            found[relative] = seen_entry(path)
    for group in groups.values():
        for relative in group:
            found[relative] += (sorted(group),)
    return found


mounts = st.integers(0, 1)
slots = st.integers(0, HANDLES - 1)
names = st.sampled_from([b"a", b"b", b"c", b"\xff odd"])
paths = st.lists(names, min_size=1, max_size=2).map(lambda parts: b"/".join(parts))
offsets = st.sampled_from([0, 1, 100, 4095, 4096, 5000, 8192, 70_000, 131_072, 200_000]) | st.integers(0, 20_000)
lengths = st.sampled_from([0, 1, 10, 4096, 10_000, 131_073]) | st.integers(0, 9000)
modes = st.sampled_from([0o644, 0o600, 0o777, 0o4755, 0o2755, 0o1777, 0o444])
times_ns = st.integers(0, LONG_AGO_NS - 1)
xattr_names = st.sampled_from(["user.x", "user.y"])
seeds = st.integers(0, 1000)
open_flags = st.builds(
    lambda access, extra: access | sum(extra),
    st.sampled_from([os.O_RDONLY, os.O_WRONLY, os.O_RDWR, os.O_RDWR, os.O_RDWR]),
    st.sets(st.sampled_from([os.O_CREAT, os.O_EXCL, os.O_TRUNC, os.O_APPEND, os.O_NOFOLLOW]), max_size=3),
)


class Oracle(RuleBasedStateMachine):
    def __init__(self, roots: tuple[bytes, bytes], local: bytes) -> None:
        super().__init__()
        run = b"run%d" % time.monotonic_ns()
        self.roots = [os.path.join(root, run) for root in roots]
        self.local = os.path.join(local, run)
        self.handles: list[Handle | None] = [None] * HANDLES
        for root in (self.roots[0], self.local):
            os.mkdir(root)

    # What every step is made of

    def store_for(self, mount: int) -> None:
        """Make what was written through the other mount visible on this one."""
        for handle in self.handles:
            if handle and handle.dirty and handle.mount != mount:
                os.fsync(handle.fd)
                handle.dirty = False

    def same(self, mount: int, operation: Operation) -> Result:
        self.store_for(mount)
        got = outcome(lambda: operation(self.roots[mount]))
        expected = outcome(lambda: operation(self.local))
        assert got == expected, f"on mount {mount}: {got}, locally: {expected}"
        return got

    def change(self, mount: int, looker: int, operation: Operation, *touched: bytes) -> None:
        """Do the same on a mount and locally, then look at what it concerns through `looker`."""
        self.same(mount, operation)
        for path in touched:
            self.look(looker, path)

    @rule(mount=mounts, path=paths)
    def look(self, mount: int, path: bytes) -> None:
        self.same(mount, lambda root: seen_entry(os.path.join(root, path)))
        self.same(mount, lambda root: seen_entry(os.path.dirname(os.path.join(root, path))))

    @rule(mount=mounts, path=paths)
    def follow(self, mount: int, path: bytes) -> None:
        self.same(mount, lambda root: seen_status(os.stat(os.path.join(root, path))))

    # Names

    @rule(mount=mounts, looker=mounts, path=paths, mode=modes)
    def mkdir(self, mount: int, looker: int, path: bytes, mode: int) -> None:
        self.change(mount, looker, lambda root: os.mkdir(os.path.join(root, path), mode), path)

    @rule(mount=mounts, looker=mounts, path=paths, seed=seeds, length=lengths)
    def write_file(self, mount: int, looker: int, path: bytes, seed: int, length: int) -> None:
        def operation(root: bytes) -> None:
            with open(os.path.join(root, path), "wb") as file:
                file.write(bytes_for(seed, length))

        self.change(mount, looker, operation, path)

    @rule(mount=mounts, looker=mounts, path=paths)
    def unlink(self, mount: int, looker: int, path: bytes) -> None:
        self.change(mount, looker, lambda root: os.unlink(os.path.join(root, path)), path)

    @rule(mount=mounts, looker=mounts, path=paths)
    def rmdir(self, mount: int, looker: int, path: bytes) -> None:
        self.change(mount, looker, lambda root: os.rmdir(os.path.join(root, path)), path)

    @rule(mount=mounts, looker=mounts, path=paths, text=paths)
    def symlink(self, mount: int, looker: int, path: bytes, text: bytes) -> None:
        self.change(mount, looker, lambda root: os.symlink(text, os.path.join(root, path)), path)

    @rule(mount=mounts, looker=mounts, old=paths, new=paths)
    def link(self, mount: int, looker: int, old: bytes, new: bytes) -> None:
        def operation(root: bytes) -> None:
            os.link(os.path.join(root, old), os.path.join(root, new), follow_symlinks=False)

        self.change(mount, looker, operation, old, new)

    @rule(
        mount=mounts,
        looker=mounts,
        old=paths,
        new=paths,
        flags=st.sampled_from([0, 0, 0, RENAME_NOREPLACE, RENAME_EXCHANGE]),
    )
    def rename(self, mount: int, looker: int, old: bytes, new: bytes, flags: int) -> None:
        def operation(root: bytes) -> None:
            renameat2(os.path.join(root, old), os.path.join(root, new), flags)

        self.change(mount, looker, operation, old, new)

    # Attributes

    @rule(mount=mounts, looker=mounts, path=paths, mode=modes)
    def chmod(self, mount: int, looker: int, path: bytes, mode: int) -> None:
        self.change(mount, looker, lambda root: os.chmod(os.path.join(root, path), mode), path)

    @precondition(lambda self: os.getuid() == 0)
    @rule(mount=mounts, looker=mounts, path=paths, uid=st.sampled_from([-1, 0, 5]), gid=st.sampled_from([-1, 0, 7]))
    def chown(self, mount: int, looker: int, path: bytes, uid: int, gid: int) -> None:
        self.change(mount, looker, lambda root: os.lchown(os.path.join(root, path), uid, gid), path)

    @rule(mount=mounts, looker=mounts, path=paths, ns=times_ns)
    def utime(self, mount: int, looker: int, path: bytes, ns: int) -> None:
        def operation(root: bytes) -> None:
            os.utime(os.path.join(root, path), ns=(ns, ns), follow_symlinks=False)

        self.change(mount, looker, operation, path)

    @rule(mount=mounts, looker=mounts, path=paths, size=offsets)
    def truncate(self, mount: int, looker: int, path: bytes, size: int) -> None:
        here = outcome(lambda: os.stat(os.path.join(self.local, path)).st_size)
        if here == ("done", size):
            return  # whether that changes the time is up to each file system
        self.change(mount, looker, lambda root: os.truncate(os.path.join(root, path), size), path)

    @rule(
        mount=mounts,
        looker=mounts,
        path=paths,
        name=xattr_names,
        value=st.binary(max_size=40),
        flags=st.sampled_from([0, 0, os.XATTR_CREATE, os.XATTR_REPLACE]),
    )
    def setxattr(self, mount: int, looker: int, path: bytes, name: str, value: bytes, flags: int) -> None:
        self.change(mount, looker, lambda root: os.setxattr(os.path.join(root, path), name, value, flags), path)

    @rule(mount=mounts, looker=mounts, path=paths, name=xattr_names)
    def removexattr(self, mount: int, looker: int, path: bytes, name: str) -> None:
        self.change(mount, looker, lambda root: os.removexattr(os.path.join(root, path), name), path)

    # Files kept open

    @rule(mount=mounts, slot=slots, path=paths, flags=open_flags, mode=modes)
    def open_file(self, mount: int, slot: int, path: bytes, flags: int, mode: int) -> None:
        self.close(slot)
        self.store_for(mount)
        opened: list[int] = []

        def operation(root: bytes) -> None:
            opened.append(os.open(os.path.join(root, path), flags | os.O_CLOEXEC, mode))

        try:
            self.same(mount, operation)
        finally:
            if len(opened) == 2:
                writable = flags & os.O_ACCMODE != os.O_RDONLY
                self.handles[slot] = Handle(mount, opened[0], opened[1], writable)
            else:
                for fd in opened:
                    os.close(fd)
        self.look(mount, path)

    @rule(slot=slots)
    def close(self, slot: int) -> None:
        handle, self.handles[slot] = self.handles[slot], None
        if handle:
            self.store_for(handle.mount)
            assert outcome(lambda: os.close(handle.fd)) == outcome(lambda: os.close(handle.local_fd))

    def on_handle(self, slot: int, operation: Callable[[int], object], *, writes: bool = False) -> None:
        handle = self.handles[slot]
        if handle is None:
            return
        self.store_for(handle.mount)
        got, expected = outcome(lambda: operation(handle.fd)), outcome(lambda: operation(handle.local_fd))
        assert got == expected, f"handle of mount {handle.mount}: {got}, locally: {expected}"
        handle.dirty |= writes and handle.writable
        at = [outcome(lambda fd=fd: os.lseek(fd, 0, os.SEEK_CUR)) for fd in (handle.fd, handle.local_fd)]  # type: ignore[misc]
        assert at[0] == at[1]
        status = [outcome(lambda fd=fd: seen_status(os.fstat(fd))) for fd in (handle.fd, handle.local_fd)]  # type: ignore[misc]
        assert status[0] == status[1], f"fstat on mount {handle.mount}: {status[0]}, locally: {status[1]}"

    @rule(slot=slots, offset=offsets, length=lengths)
    def pread(self, slot: int, offset: int, length: int) -> None:
        self.on_handle(slot, lambda fd: os.pread(fd, length, offset))

    @rule(slot=slots, length=lengths)
    def read(self, slot: int, length: int) -> None:
        self.on_handle(slot, lambda fd: os.read(fd, length))

    @rule(slot=slots, offset=offsets, length=lengths, seed=seeds)
    def pwrite(self, slot: int, offset: int, length: int, seed: int) -> None:
        self.on_handle(slot, lambda fd: os.pwrite(fd, bytes_for(seed, length), offset), writes=True)

    @rule(slot=slots, length=lengths, seed=seeds)
    def write(self, slot: int, length: int, seed: int) -> None:
        self.on_handle(slot, lambda fd: os.write(fd, bytes_for(seed, length)), writes=True)

    @rule(slot=slots, offset=offsets, whence=st.sampled_from([os.SEEK_SET, os.SEEK_CUR, os.SEEK_END]))
    def seek(self, slot: int, offset: int, whence: int) -> None:
        self.on_handle(slot, lambda fd: os.lseek(fd, offset, whence))

    @rule(slot=slots, size=offsets)
    def ftruncate(self, slot: int, size: int) -> None:
        self.on_handle(slot, lambda fd: os.ftruncate(fd, size), writes=True)

    @rule(slot=slots, data_only=st.booleans())
    def fsync(self, slot: int, data_only: bool) -> None:
        self.on_handle(slot, os.fdatasync if data_only else os.fsync)
        handle = self.handles[slot]
        if handle:
            handle.dirty = False

    @rule(slot=slots, mode=modes)
    def fchmod(self, slot: int, mode: int) -> None:
        self.on_handle(slot, lambda fd: os.fchmod(fd, mode))

    @rule(slot=slots, ns=times_ns)
    def futime(self, slot: int, ns: int) -> None:
        self.on_handle(slot, lambda fd: os.utime(fd, ns=(ns, ns)))

    @rule(slot=slots, at=st.integers(0, 9000), value=st.integers(0, 255))
    def write_through_mapping(self, slot: int, at: int, value: int) -> None:
        def operation(fd: int) -> object:
            size = os.fstat(fd).st_size
            if not size:
                return None
            with mmap.mmap(fd, size) as mapped:
                old = mapped[at % size]
                mapped[at % size] = value
                mapped.flush()
            return old

        self.on_handle(slot, operation)

    # The whole

    def teardown(self) -> None:
        for slot in range(HANDLES):
            self.close(slot)
        expected = seen_tree(self.local)
        for mount, root in enumerate(self.roots):
            got = seen_tree(root)
            assert got == expected, f"in the end, on mount {mount}"


@pytest.mark.limit_s(LIMIT_S)
def test_mounts_and_a_local_directory_are_the_same(cell: View, tmp_path: Path) -> None:
    old_umask = os.umask(0o022)
    try:
        run_state_machine_as_test(
            lambda: Oracle((os.fsencode(cell.a), os.fsencode(cell.b)), os.fsencode(tmp_path)),
            settings=settings(
                max_examples=EXAMPLES,
                stateful_step_count=STEPS,
                derandomize=CHOSEN is None,
                database=None,
                deadline=None,
                phases=(Phase.generate, Phase.shrink) if CHOSEN else (Phase.generate,),
                suppress_health_check=list(HealthCheck),
            ),
        )
    finally:
        os.umask(old_umask)
