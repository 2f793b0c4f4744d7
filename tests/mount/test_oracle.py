"""Random operations on two mounts and on a local directory: everything that can be observed is the same.

Each step picks one of the mounts. Guarantees concern what is stored: before a step looks through one mount, files
written through the other are fsynced, as an application would. Everything else is compared at once: results, errno,
contents, stat fields, listings, xattrs, symlink targets. Not compared: blocks on disk, access and change times, and
modification times that nobody set (only that they are of today).

PROMISEFS_ORACLE_EXAMPLES=N runs N random histories; the default run is always the same one. With
PROMISEFS_ORACLE_SHRINK=1 a history that fails is made as short as possible, which takes minutes.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, Phase, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test
from trees import RENAME_EXCHANGE, RENAME_NOREPLACE, bytes_for, renameat2

if TYPE_CHECKING:
    from conftest import View

CHOSEN = os.environ.get("PROMISEFS_ORACLE_EXAMPLES")
EXAMPLES = int(CHOSEN or 250)
STEPS = 40
SHRINK = "PROMISEFS_ORACLE_SHRINK" in os.environ
LIMIT_S = 240 + EXAMPLES + (600 if SHRINK else 0)
LONG_AGO_NS = 10**18
"""Times that the test sets are before this moment in 2001, times that an operation leaves are after it."""
HANDLES = 5
NAMES = [b"a", b"b", b"c", b"f", b"\xff odd"]

Result = tuple[object, ...]
At = Callable[[bytes], bytes]
"""Makes a path relative to the tree a path on a mount, or in the local directory."""
Operation = Callable[[At], object]


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


def open_up(root: bytes) -> None:
    """Let the owner look at everything below."""
    for folder, folders, files in os.walk(root):
        for name in [*folders, *files]:
            path = os.path.join(folder, name)
            mode = os.lstat(path).st_mode
            if stat.S_ISDIR(mode) or stat.S_ISREG(mode):
                os.chmod(path, stat.S_IMODE(mode) | 0o700)


mounts = st.integers(0, 1)
picks = st.integers(0, 2**20 - 1)
"""Stands for a path or an open file; which one depends on what there is, see `Oracle.pick`."""
offsets = st.sampled_from([0, 1, 100, 4095, 4096, 5000, 8192, 70_000, 131_072, 200_000, 1 << 20, 3_000_000])
offsets |= st.integers(0, 20_000)
lengths = st.sampled_from([0, 1, 10, 4096, 10_000, 131_073]) | st.integers(0, 9000)
modes = st.sampled_from([0o644, 0o600, 0o777, 0o4755, 0o2755, 0o1777, 0o444])
times_ns = st.integers(0, LONG_AGO_NS - 1)
xattr_names = st.sampled_from(["user.x", "user.y"])
seeds = st.integers(0, 1000)
accesses = st.sampled_from([os.O_RDONLY, os.O_WRONLY, os.O_RDWR, os.O_RDWR, os.O_RDWR])
extras = st.sampled_from([0, os.O_CREAT, os.O_CREAT | os.O_EXCL, os.O_TRUNC, os.O_APPEND, os.O_NOFOLLOW])
open_flags = st.tuples(accesses, extras, extras).map(lambda parts: parts[0] | parts[1] | parts[2])


class Oracle(RuleBasedStateMachine):
    def __init__(self, roots: tuple[bytes, bytes], local: bytes) -> None:
        super().__init__()
        run = b"run%d" % time.monotonic_ns()
        self.roots = [os.path.join(root, run) for root in roots]
        self.local = os.path.join(local, run)
        self.handles: list[Handle] = []
        self.differs = False
        for root in (self.roots[0], self.local):
            os.makedirs(os.path.join(root, b"a", b"d"))
            os.mkdir(os.path.join(root, b"b"))
            for number, name in enumerate((b"f", b"a/f", b"a/d/g", b"b/h")):
                with open(os.path.join(root, name), "wb") as file:
                    file.write(bytes_for(number, number * 70_000))

    @initialize(mount=mounts, other=mounts, flags=open_flags)
    def begin_with_open_files(self, mount: int, other: int, flags: int) -> None:
        self.open_path(mount, b"a/f", os.O_RDWR, 0o644)
        self.open_path(other, b"f", flags, 0o644)

    # What every step is made of

    def pick(self, number: int, kinds: str = "dfl") -> bytes:
        """A path: mostly of a directory, file or symlink that there is, else of a name in any directory."""
        number, chance = divmod(number, 8)
        found, folders = [], [b""]
        for folder, directories, files in os.walk(self.local):
            below = os.path.relpath(folder, self.local) if folder != self.local else b""
            for name in sorted([*directories, *files]):
                path = os.path.join(below, name)
                full = os.path.join(folder, name)
                kind = "l" if os.path.islink(full) else "d" if name in directories else "f"
                if kind in kinds:
                    found.append(path)
                if name in directories:
                    folders.append(path)
        if kinds and found and chance:
            return found[number % len(found)]
        number, index = divmod(number, len(NAMES))
        return os.path.join(folders[number % len(folders)], NAMES[index])

    def store_for(self, mount: int) -> None:
        """Make what was written through the other mount visible on this one."""
        for handle in self.handles:
            if handle.dirty and handle.mount != mount:
                os.fsync(handle.fd)
                handle.dirty = False

    def same(self, mount: int, operation: Operation) -> Result:
        """Do it on the mount and locally; the results must be equal."""
        self.store_for(mount)
        got = outcome(lambda: operation(lambda path: os.path.join(self.roots[mount], path)))
        expected = outcome(lambda: operation(lambda path: os.path.join(self.local, path)))
        self.agree(got, expected, f"mount {mount}")
        return got

    def agree(self, got: object, expected: object, where: str) -> None:
        if got != expected:
            self.differs = True
            raise AssertionError(f"{where}: {got!r:.1500}\nlocally: {expected!r:.1500}")

    def change(self, what: str, mount: int, looker: int, operation: Operation, *touched: bytes) -> None:
        """Do the same on a mount and locally, then look at what it concerns through `looker`."""
        note(f"{what} {touched} on mount {mount}, seen by {looker}")
        self.same(mount, operation)
        for path in touched:
            self.look_at(looker, path)

    def look_at(self, mount: int, path: bytes) -> None:
        self.same(mount, lambda at: seen_entry(at(path)))
        self.same(mount, lambda at: seen_entry(os.path.dirname(at(path))))

    @rule(mount=mounts, pick=picks)
    def look(self, mount: int, pick: int) -> None:
        self.look_at(mount, self.pick(pick))

    @rule(mount=mounts, pick=picks)
    def follow(self, mount: int, pick: int) -> None:
        path = self.pick(pick, "l")
        self.same(mount, lambda at: seen_status(os.stat(at(path))))

    # Names

    @rule(mount=mounts, looker=mounts, pick=picks, mode=modes)
    def mkdir(self, mount: int, looker: int, pick: int, mode: int) -> None:
        path = self.pick(pick, "")
        self.change("mkdir", mount, looker, lambda at: os.mkdir(at(path), mode), path)

    @rule(mount=mounts, looker=mounts, pick=picks, there=st.sampled_from(["", "f"]), seed=seeds, length=lengths)
    def write_file(self, mount: int, looker: int, pick: int, there: str, seed: int, length: int) -> None:
        path = self.pick(pick, there)

        def operation(at: At) -> None:
            with open(at(path), "wb") as file:
                file.write(bytes_for(seed, length))

        self.change(f"write {length} bytes", mount, looker, operation, path)

    @rule(mount=mounts, looker=mounts, pick=picks)
    def unlink(self, mount: int, looker: int, pick: int) -> None:
        path = self.pick(pick, "fl")
        self.change("unlink", mount, looker, lambda at: os.unlink(at(path)), path)

    @rule(mount=mounts, looker=mounts, pick=picks)
    def rmdir(self, mount: int, looker: int, pick: int) -> None:
        path = self.pick(pick, "d")
        self.change("rmdir", mount, looker, lambda at: os.rmdir(at(path)), path)

    @rule(mount=mounts, looker=mounts, pick=picks, text=st.sampled_from([b"a", b"../f", b"a/d", b"c", b"."]))
    def make_symlink(self, mount: int, looker: int, pick: int, text: bytes) -> None:
        path = self.pick(pick, "")
        self.change(f"symlink to {text!r}", mount, looker, lambda at: os.symlink(text, at(path)), path)

    @rule(mount=mounts, looker=mounts, old_pick=picks, new_pick=picks)
    def link(self, mount: int, looker: int, old_pick: int, new_pick: int) -> None:
        old, new = self.pick(old_pick, "fl"), self.pick(new_pick, "")
        self.change("link", mount, looker, lambda at: os.link(at(old), at(new), follow_symlinks=False), old, new)

    @rule(
        mount=mounts,
        looker=mounts,
        old_pick=picks,
        new_pick=picks,
        over=st.sampled_from(["", "f", "d", "dfl"]),
        flags=st.sampled_from([0, 0, 0, RENAME_NOREPLACE, RENAME_EXCHANGE]),
    )
    def rename(self, mount: int, looker: int, old_pick: int, new_pick: int, over: str, flags: int) -> None:
        old, new = self.pick(old_pick), self.pick(new_pick, over)
        self.change(f"rename ({flags})", mount, looker, lambda at: renameat2(at(old), at(new), flags), old, new)

    # Attributes

    @rule(mount=mounts, looker=mounts, pick=picks, mode=modes)
    def chmod(self, mount: int, looker: int, pick: int, mode: int) -> None:
        path = self.pick(pick)
        self.change(f"chmod {mode:o}", mount, looker, lambda at: os.chmod(at(path), mode), path)

    @precondition(lambda self: os.getuid() == 0)
    @rule(mount=mounts, looker=mounts, pick=picks, uid=st.sampled_from([-1, 0, 5]), gid=st.sampled_from([-1, 0, 7]))
    def chown(self, mount: int, looker: int, pick: int, uid: int, gid: int) -> None:
        path = self.pick(pick)
        self.change(f"chown {uid}:{gid}", mount, looker, lambda at: os.lchown(at(path), uid, gid), path)

    @rule(mount=mounts, looker=mounts, pick=picks, ns=times_ns)
    def utime(self, mount: int, looker: int, pick: int, ns: int) -> None:
        path = self.pick(pick)
        self.change("utime", mount, looker, lambda at: os.utime(at(path), ns=(ns, ns), follow_symlinks=False), path)

    @rule(mount=mounts, looker=mounts, pick=picks, size=offsets)
    def truncate(self, mount: int, looker: int, pick: int, size: int) -> None:
        path = self.pick(pick, "f")
        here = outcome(lambda: os.stat(os.path.join(self.local, path)).st_size)
        if here == ("done", size):
            return  # whether that changes the time is up to each file system
        self.change(f"truncate to {size}", mount, looker, lambda at: os.truncate(at(path), size), path)

    @rule(
        mount=mounts,
        looker=mounts,
        pick=picks,
        name=xattr_names,
        value=st.binary(max_size=40),
        flags=st.sampled_from([0, 0, os.XATTR_CREATE, os.XATTR_REPLACE]),
    )
    def setxattr(self, mount: int, looker: int, pick: int, name: str, value: bytes, flags: int) -> None:
        path = self.pick(pick)
        self.change("setxattr", mount, looker, lambda at: os.setxattr(at(path), name, value, flags), path)

    @rule(mount=mounts, looker=mounts, pick=picks, name=xattr_names)
    def removexattr(self, mount: int, looker: int, pick: int, name: str) -> None:
        path = self.pick(pick)
        self.change("removexattr", mount, looker, lambda at: os.removexattr(at(path), name), path)

    # Files kept open

    @rule(mount=mounts, pick=picks, there=st.sampled_from(["", "fl", "f", "f"]), flags=open_flags, mode=modes)
    def open_file(self, mount: int, pick: int, there: str, flags: int, mode: int) -> None:
        if len(self.handles) == HANDLES:
            self.close(pick)
        self.open_path(mount, self.pick(pick, there), flags, mode)

    def open_path(self, mount: int, path: bytes, flags: int, mode: int) -> None:
        note(f"open {path!r} flags {flags:o} on mount {mount}")
        opened: list[int] = []
        try:
            self.same(mount, lambda at: opened.append(os.open(at(path), flags | os.O_CLOEXEC, mode)))
        finally:
            if len(opened) == 2:
                writable = flags & os.O_ACCMODE != os.O_RDONLY
                self.handles.append(Handle(mount, opened[0], opened[1], writable))
            else:
                for fd in opened:
                    os.close(fd)
        self.look_at(mount, path)

    @precondition(lambda self: self.handles)
    @rule(pick=picks)
    def close(self, pick: int) -> None:
        handle = self.handles.pop(pick % len(self.handles))
        self.store_for(handle.mount)
        got, expected = outcome(lambda: os.close(handle.fd)), outcome(lambda: os.close(handle.local_fd))
        self.agree(got, expected, f"close on mount {handle.mount}")

    def on_handle(self, what: str, pick: int, operation: Callable[[int], object], *, writes: bool = False) -> None:
        handle = self.handles[pick % len(self.handles)]
        note(f"{what} on handle {pick % len(self.handles)} of mount {handle.mount}")
        self.store_for(handle.mount)
        got, expected = outcome(lambda: operation(handle.fd)), outcome(lambda: operation(handle.local_fd))
        self.agree(got, expected, f"handle of mount {handle.mount}")
        handle.dirty |= writes and handle.writable
        got, expected = (
            (os.lseek(fd, 0, os.SEEK_CUR), *seen_status(os.fstat(fd))) for fd in (handle.fd, handle.local_fd)
        )
        self.agree(got, expected, f"position and status of handle of mount {handle.mount}")

    @precondition(lambda self: self.handles)
    @rule(pick=picks, offset=offsets, length=lengths)
    def pread(self, pick: int, offset: int, length: int) -> None:
        self.on_handle(f"read {length} at {offset}", pick, lambda fd: os.pread(fd, length, offset))

    @precondition(lambda self: self.handles)
    @rule(pick=picks, length=lengths)
    def read(self, pick: int, length: int) -> None:
        self.on_handle(f"read {length}", pick, lambda fd: os.read(fd, length))

    @precondition(lambda self: self.handles)
    @rule(pick=picks, offset=offsets, length=lengths, seed=seeds)
    def pwrite(self, pick: int, offset: int, length: int, seed: int) -> None:
        def operation(fd: int) -> int:
            return os.pwrite(fd, bytes_for(seed, length), offset)

        self.on_handle(f"write {length} at {offset}", pick, operation, writes=True)

    @precondition(lambda self: self.handles)
    @rule(pick=picks, length=lengths, seed=seeds)
    def write(self, pick: int, length: int, seed: int) -> None:
        def operation(fd: int) -> int:
            written = os.write(fd, bytes_for(seed, length))
            if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_APPEND:
                # Where the descriptor then stands is the kernel's idea, from before changes on the other mount.
                os.lseek(fd, 0, os.SEEK_SET)
            return written

        self.on_handle(f"write {length}", pick, operation, writes=True)

    @precondition(lambda self: self.handles)
    @rule(pick=picks, offset=offsets, whence=st.sampled_from([os.SEEK_SET, os.SEEK_CUR, os.SEEK_END]))
    def seek(self, pick: int, offset: int, whence: int) -> None:
        self.on_handle(f"seek {offset} from {whence}", pick, lambda fd: os.lseek(fd, offset, whence))

    @precondition(lambda self: self.handles)
    @rule(pick=picks, size=offsets)
    def ftruncate(self, pick: int, size: int) -> None:
        self.on_handle(f"ftruncate to {size}", pick, lambda fd: os.ftruncate(fd, size), writes=True)

    @precondition(lambda self: self.handles)
    @rule(pick=picks, data_only=st.booleans())
    def fsync(self, pick: int, data_only: bool) -> None:
        self.on_handle("fsync", pick, os.fdatasync if data_only else os.fsync)
        self.handles[pick % len(self.handles)].dirty = False

    @precondition(lambda self: self.handles)
    @rule(pick=picks, mode=modes)
    def fchmod(self, pick: int, mode: int) -> None:
        self.on_handle(f"fchmod {mode:o}", pick, lambda fd: os.fchmod(fd, mode))

    @precondition(lambda self: self.handles)
    @rule(pick=picks, ns=times_ns)
    def futime(self, pick: int, ns: int) -> None:
        self.on_handle("utime", pick, lambda fd: os.utime(fd, ns=(ns, ns)))

    @precondition(lambda self: self.handles)
    @rule(pick=picks, at=st.integers(0, 9000), value=st.integers(0, 255))
    def write_through_mapping(self, pick: int, at: int, value: int) -> None:
        def operation(fd: int) -> object:
            size = os.fstat(fd).st_size
            if not size:
                return None
            with mmap.mmap(fd, size) as mapped:
                old = mapped[at % size]
                mapped[at % size] = value
                mapped.flush()
            return old

        self.on_handle("map", pick, operation)

    # The whole

    def teardown(self) -> None:
        while self.handles:
            self.close(0)
        if os.geteuid() != 0:
            # Modes that shut out their owner would hide the rest from us, and from who tidies up.
            for root in (self.roots[0], self.local):
                open_up(root)
        if self.differs:
            return
        expected = seen_tree(self.local)
        for mount, root in enumerate(self.roots):
            got = seen_tree(root)
            for path in sorted({*got, *expected}):
                self.agree(got.get(path), expected.get(path), f"in the end, {path!r} on mount {mount}")


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
                phases=(Phase.generate, Phase.shrink) if SHRINK else (Phase.generate,),
                report_multiple_bugs=False,
                suppress_health_check=list(HealthCheck),
            ),
        )
    finally:
        os.umask(old_umask)
