"""Snapshots of directory trees that can be compared, and a source tree with a bit of everything."""

from __future__ import annotations

import ctypes
import hashlib
import os
import random
import stat
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

TOOL_LIMIT_S = 100
"""Time for one tool."""
RENAME_NOREPLACE, RENAME_EXCHANGE = 1, 2
AT_FDCWD = -100
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Entry:
    """All that one mount must show as another does; times of access and blocks on disk are left out."""

    mode: int
    uid: int
    gid: int
    size: int
    """0 for directories: file systems count them as they like."""
    mtime_ns: int
    content: str
    """Digest of a file, target of a symlink, else empty."""
    xattrs: tuple[tuple[str, bytes], ...]
    same_as: tuple[bytes, ...]
    """Names of the tree that are hard links of this file, itself included."""
    nlink: int


def digest(path: bytes | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def entry_of(path: bytes) -> tuple[Entry, tuple[int, int]]:
    """The entry, and what identifies its inode."""
    st = os.lstat(path)
    content = ""
    if stat.S_ISREG(st.st_mode):
        content = digest(path)
    elif stat.S_ISLNK(st.st_mode):
        content = os.fsdecode(os.readlink(path))
        assert st.st_size == len(os.readlink(path))
    xattrs: tuple[tuple[str, bytes], ...] = ()
    if stat.S_ISREG(st.st_mode) or stat.S_ISDIR(st.st_mode):
        names = sorted(n for n in os.listxattr(path) if n.startswith("user."))
        xattrs = tuple((name, os.getxattr(path, name)) for name in names)
    is_dir = stat.S_ISDIR(st.st_mode)
    entry = Entry(
        mode=st.st_mode,
        uid=st.st_uid,
        gid=st.st_gid,
        size=0 if is_dir else st.st_size,
        mtime_ns=st.st_mtime_ns,
        content=content,
        xattrs=xattrs,
        same_as=(),
        nlink=0 if is_dir else st.st_nlink,
    )
    return entry, (st.st_dev, st.st_ino)


def snapshot(root: Path, *, times: bool = True) -> dict[bytes, Entry]:
    """What is below `root`, by path relative to it; without `times` mtime_ns is 0 everywhere."""
    top = os.fsencode(root)
    found: dict[bytes, tuple[Entry, tuple[int, int]]] = {}
    for folder, folders, files in os.walk(top, onerror=_fail):
        for name in [*folders, *files]:
            path = os.path.join(folder, name)
            found[os.path.relpath(path, top)] = entry_of(path)
    groups: dict[tuple[int, int], list[bytes]] = {}
    for path, (_, inode) in found.items():
        groups.setdefault(inode, []).append(path)
    return {
        path: replace(entry, same_as=tuple(sorted(groups[inode])), mtime_ns=entry.mtime_ns if times else 0)
        for path, (entry, inode) in sorted(found.items())
    }


def _fail(error: OSError) -> None:
    raise error


def assert_same_trees(one: Path, other: Path, *, times: bool = True) -> None:
    differences(snapshot(one, times=times), snapshot(other, times=times), f"{one} and {other}")


def differences(one: Mapping[bytes, Entry], other: Mapping[bytes, Entry], what: str) -> None:
    """Fail, naming what differs, unless the snapshots are equal."""
    lines = [f"  only in the first: {path!r}" for path in one if path not in other]
    lines += [f"  only in the second: {path!r}" for path in other if path not in one]
    common = [path for path in one if path in other]
    lines += [f"  {path!r}:\n    {one[path]}\n    {other[path]}" for path in common if one[path] != other[path]]
    assert not lines, f"{what} differ:\n" + "\n".join(lines[:20])


def run(*command: str | Path, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> str:
    """Run a tool, which must succeed within its time; return what it said on stdout."""
    done = subprocess.run(
        [os.fspath(part) for part in command],
        cwd=cwd,
        env={**os.environ, "LC_ALL": "C.UTF-8", **(env or {})},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=TOOL_LIMIT_S,
    )
    said = done.stdout.decode(errors="surrogateescape")
    assert done.returncode == 0, f"{command} ended with {done.returncode}: {said[-2000:]}{done.stderr.decode()[-2000:]}"
    return said


def renameat2(old: Path | bytes, new: Path | bytes, flags: int) -> None:
    """renameat2(2); raise OSError."""
    if _libc.renameat2(AT_FDCWD, os.fsencode(old), AT_FDCWD, os.fsencode(new), flags) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), os.fsdecode(new))


def bytes_for(seed: int, size: int) -> bytes:
    return random.Random(seed).randbytes(size)


def make_source(root: Path) -> Path:
    """Make `root`: files of many sizes, modes and times, hard links, symlinks, odd names, xattrs."""
    root.mkdir()
    for d in ("empty", "sub", "sub/deep/er", "many", "sp ace"):
        (root / d).mkdir(parents=True, exist_ok=True)
    for i, size in enumerate((0, 1, 511, 4095, 4096, 4097, 65536, 131072, 131073, 1 << 20, (3 << 20) + 17)):
        path = root / "sub" / f"file{size}"
        path.write_bytes(bytes_for(i, size))
        path.chmod((0o600, 0o644, 0o755, 0o444, 0o4755)[i % 5])
    for i in range(150):
        (root / "many" / f"n{i:03}.txt").write_text(f"number {i}\n" * (i % 7))
    (root / "sub/deep/er/leaf").write_bytes(b"leaf")
    os.link(root / "sub/deep/er/leaf", root / 'sp ace/leaf\'s "link"')
    os.link(root / "sub/deep/er/leaf", root / "leaf2")
    os.symlink("sub/deep", root / "to_deep")
    os.symlink("../nowhere", root / "sub/dangling")
    os.symlink("/absolute/nowhere", root / "absolute")
    Path(os.fsdecode(os.fsencode(root) + b"/\xff\xfe not utf-8 \n\x01")).write_bytes(b"odd")
    (root / ("long" + "g" * 251)).write_bytes(b"long")
    os.setxattr(root / "leaf2", "user.kind", b"linked\0bytes")
    os.setxattr(root / "many", "user.of", b"a directory")
    os.mkfifo(root / "fifo")
    _date(root)
    return root


def _date(root: Path) -> None:
    """Give everything a time of its own, with nanoseconds, from the leaves up."""
    moment = 1_234_567_890_123_456_789
    for folder, folders, files in os.walk(os.fsencode(root), topdown=False):
        for name in [*files, *folders]:
            moment += 86_400_000_000_007
            os.utime(os.path.join(folder, name), ns=(moment, moment + 1), follow_symlinks=False)
