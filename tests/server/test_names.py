"""Names: what each change does to directories and links, and the same errors as a local directory gives."""

from __future__ import annotations

import ctypes
import errno
import itertools
import os
import stat
from pathlib import Path

import pytest
import trio
from promisefs_protocol.abort import AbortCode, Aborted
from promisefs_protocol.ids import Fid
from promisefs_protocol.messages import MAX_LIST, CreateFile, FetchDirectory, ListXattrs, MakeDir, SetXattr
from server_cell import Cell, Client


async def code(awaitable: object) -> AbortCode:
    with pytest.raises(Aborted) as refusal:
        await awaitable  # type: ignore[misc]
    return AbortCode(refusal.value.code)


async def test_create_lookup_list(cell: Cell) -> None:
    a = await cell.connected()
    made = {name: (await a.create(name)).fid for name in (b"b", b"a", b"\xff\xfe", b"x" * 255)}
    for name, fid in made.items():
        found = await a.lookup(name)
        assert found is not None and found.fid == fid and found.status.is_file and found.promise_s > 0
    assert await a.lookup(b"none") is None
    reply = await a.call(FetchDirectory(a.root, b"", 100))
    assert [(name, entry.fid) for name, entry in reply.entries] == sorted(made.items())
    assert await code(a.create(b"a")) == AbortCode.EXIST


async def test_pages_join_without_gap(cell: Cell) -> None:
    a = await cell.connected()
    names = [b"%03d" % i for i in range(25)]
    for name in names:
        await a.create(name)
    seen: list[bytes] = []
    more = True
    while more:
        reply = await a.call(FetchDirectory(a.root, seen[-1] if seen else b"", 10))
        seen += [name for name, _ in reply.entries]
        more = reply.more
    assert seen == names


async def test_directory_counts(cell: Cell) -> None:
    a = await cell.connected()
    before = (await a.stat(a.root)).status
    d = await a.mkdir(b"d")
    assert d.status.nlink == 2
    after = (await a.stat(a.root)).status
    assert (after.nlink, after.data_version) == (before.nlink + 1, before.data_version + 1)
    assert after.mtime_ns > before.mtime_ns and after.ctime_ns > before.ctime_ns
    await a.mkdir(b"e")
    await a.create(b"f", d.fid)
    await a.mkdir(b"sub", d.fid)
    # A move within one directory is one change of it, a move between two one of each.
    version = (await a.stat(d.fid)).status.data_version
    reply = await a.rename((d.fid, b"f"), (d.fid, b"g"))
    assert reply.old_directory.status.data_version == reply.new_directory.status.data_version == version + 1
    reply = await a.rename((d.fid, b"sub"), (a.root, b"sub"))
    assert reply.old_directory.status.nlink == 2 and reply.old_directory.status.data_version == version + 2
    assert reply.new_directory.status.nlink == before.nlink + 3
    assert await code(a.rmdir(b"d")) == AbortCode.NOTEMPTY
    await a.rmdir(b"sub")
    assert (await a.stat(a.root)).status.nlink == before.nlink + 2


async def test_ctime_grows_though_the_clock_stands_still(cell: Cell, monkeypatch: pytest.MonkeyPatch) -> None:
    a = await cell.connected()
    fid = (await a.create(b"f")).fid
    monkeypatch.setattr("time.time_ns", lambda: 1)
    times = [(await a.chmod(fid, mode)).status.ctime_ns for mode in (0o600, 0o640, 0o644)]
    assert times == sorted(set(times))


async def test_setgid_directory(cell: Cell) -> None:
    a = await cell.connected()
    d = (await a.call(MakeDir(a.op(), a.root, b"d", 0o2755, 0, 77))).entry
    assert (await a.create(b"f", d.fid)).status.gid == 77
    sub = await a.mkdir(b"sub", d.fid)
    assert sub.status.gid == 77 and sub.status.mode & stat.S_ISGID


async def test_links(cell: Cell) -> None:
    a = await cell.connected()
    d = await a.mkdir(b"d")
    f = await a.create(b"f")
    linked = await a.link(f.fid, b"g", d.fid)
    assert linked.entry.status.nlink == 2 and linked.directory.fid == d.fid
    assert await code(a.link(d.fid, b"dd")) == AbortCode.PERM
    assert await code(a.link(f.fid, b"g", d.fid)) == AbortCode.EXIST
    assert (await a.unlink(b"f")).entry.status.nlink == 1
    assert (await a.unlink(b"g", d.fid)).entry.status.nlink == 0
    assert await code(a.stat(f.fid)) == AbortCode.VNOVNODE


async def test_types_and_wrong_kinds(cell: Cell) -> None:
    a = await cell.connected()
    f = await a.create(b"f")
    d = await a.mkdir(b"d")
    assert stat.S_ISFIFO((await a.create(b"p", mode=stat.S_IFIFO | 0o600)).status.mode)
    assert stat.S_ISSOCK((await a.create(b"s", mode=stat.S_IFSOCK | 0o600)).status.mode)
    assert await code(a.create(b"c", mode=stat.S_IFCHR | 0o600)) == AbortCode.PERM
    link = await a.symlink(b"l", b"some/where")
    assert link.status.is_symlink and link.status.size == 10
    assert await a.fetch(link.fid) == b"some/where"
    assert await code(a.create(b"x", f.fid)) == AbortCode.NOTDIR
    assert await code(a.unlink(b"d")) == AbortCode.ISDIR
    assert await code(a.rmdir(b"f")) == AbortCode.NOTDIR
    assert await code(a.unlink(b"none")) == AbortCode.NOENT
    assert await code(a.store(d.fid, b"x")) == AbortCode.ISDIR
    assert await code(a.store(link.fid, b"x")) == AbortCode.INVAL
    assert await code(a.fetch(d.fid)) == AbortCode.ISDIR
    assert await code(a.truncate(d.fid, 0)) == AbortCode.ISDIR


async def test_nothing_changes_when_refused(cell: Cell) -> None:
    a = await cell.connected()
    await a.create(b"f")
    before = await a.stat(a.root)
    assert await code(a.create(b"f")) == AbortCode.EXIST
    assert await code(a.rename((a.root, b"none"), (a.root, b"f"))) == AbortCode.NOENT
    assert await a.stat(a.root) == before


async def test_vnode_numbers_are_never_used_twice(cell: Cell) -> None:
    a = await cell.connected()
    fids = set()
    for _ in range(5):
        fids.add((await a.create(b"f")).fid.vnode)
        await a.unlink(b"f")
    assert len(fids) == 5


async def test_no_more_xattrs_than_one_reply_lists(cell: Cell) -> None:
    a = await cell.connected()
    f = await a.create(b"f")
    store = cell.server.store
    with store.database.transaction():
        rows = ((store.vnodes.get(f.fid).key, b"user.%d" % i, b"") for i in range(MAX_LIST))
        for row in rows:
            store.database.execute("INSERT INTO xattrs VALUES (?, ?, ?)", row)
    with pytest.raises(Aborted) as refusal:
        await a.calls.call(SetXattr(f.fid, b"user.one-too-many", 0), b"")
    assert refusal.value.code == AbortCode.NOSPC
    await a.calls.call(SetXattr(f.fid, b"user.0", 0), b"replaced")
    assert len((await a.call(ListXattrs(f.fid))).names) == MAX_LIST


async def test_xattrs(cell: Cell) -> None:
    from promisefs_protocol.messages import GetXattr, ListXattrs, RemoveXattr

    a = await cell.connected()
    f = await a.create(b"f")
    set_reply = await a.call(SetXattr(f.fid, b"user.a", 1), b"1")
    assert set_reply.entry.status.xattr_count == 1
    assert set_reply.entry.status.ctime_ns > f.status.ctime_ns
    assert await code(a.call(SetXattr(f.fid, b"user.a", 1), b"2")) == AbortCode.EXIST
    assert await code(a.call(SetXattr(f.fid, b"user.b", 2), b"2")) == AbortCode.NODATA
    assert await code(a.call(SetXattr(f.fid, b"trusted.b", 0), b"2")) == AbortCode.NOTSUP
    assert await code(a.call(SetXattr(f.fid, b"user.b", 0), b"x" * 65537)) == AbortCode.XATTR_TOO_BIG
    await a.call(SetXattr(f.fid, b"user.a", 2), b"3")
    assert (await a.calls.call(GetXattr(f.fid, b"user.a")))[1] == b"3"
    assert (await a.call(ListXattrs(f.fid))).names == (b"user.a",)
    assert (await a.call(RemoveXattr(f.fid, b"user.a"))).entry.status.xattr_count == 0
    assert await code(a.call(RemoveXattr(f.fid, b"user.a"))) == AbortCode.NODATA
    assert await code(a.call(GetXattr(f.fid, b"user.a"))) == AbortCode.NODATA


async def test_one_operation_costs_the_same_in_a_large_directory(cell: Cell) -> None:
    """Counted in SQLite's virtual machine steps, which do not depend on the machine."""
    a = await cell.connected()
    connection = cell.server.store.database._connection
    steps = 0

    def count() -> int:
        nonlocal steps
        steps += 1
        return 0

    async def cost(name: bytes) -> int:
        nonlocal steps
        steps = 0
        connection.set_progress_handler(count, 10)
        await a.create(name)
        await a.lookup(name)
        await a.call(FetchDirectory(a.root, name, 5))
        await a.rename((a.root, name), (a.root, name + b"'"))
        await a.unlink(name + b"'")
        connection.set_progress_handler(None, 0)
        return steps

    small = await cost(b"n")
    for i in range(3000):
        await a.create(b"m%05d" % i)
    assert await cost(b"n") <= small * 2


# Rename against the local kernel

LIBC = ctypes.CDLL(None, use_errno=True)
KINDS = ("none", "file", "link", "empty", "full")
FLAGS = (0, 1, 2, 3)


def local_rename(old: Path, new: Path, flags: int) -> int:
    if LIBC.renameat2(-100, os.fsencode(old), -100, os.fsencode(new), flags) == 0:
        return 0
    return ctypes.get_errno()


def make_local(parent: Path, kind: str, name: str) -> None:
    path = parent / name
    if kind == "file":
        path.write_bytes(b"")
    elif kind == "link":
        path.symlink_to("nowhere")
    elif kind != "none":
        path.mkdir()
        if kind == "full":
            (path / "inner").mkdir()


async def make_remote(a: Client, parent: Fid, kind: str, name: bytes) -> None:
    if kind == "file":
        await a.create(name, parent)
    elif kind == "link":
        from promisefs_protocol.messages import Symlink

        await a.call(Symlink(a.op(), parent, name, b"nowhere", 0, 0))
    elif kind != "none":
        made = await a.mkdir(name, parent)
        if kind == "full":
            await a.mkdir(b"inner", made.fid)


async def remote_tree(a: Client, directory: Fid) -> dict[str, object]:
    tree: dict[str, object] = {".nlink": (await a.stat(directory)).status.nlink}
    for name, entry in (await a.call(FetchDirectory(directory, b"", 100))).entries:
        key = os.fsdecode(name)
        tree[key] = await remote_tree(a, entry.fid) if entry.status.is_dir else stat.S_IFMT(entry.status.mode)
    return tree


def local_tree(directory: Path, nlink_of: dict[str, int] | None = None) -> dict[str, object]:
    tree: dict[str, object] = {".nlink": 2 + sum(p.is_dir() and not p.is_symlink() for p in directory.iterdir())}
    for path in directory.iterdir():
        is_dir = path.is_dir() and not path.is_symlink()
        tree[path.name] = local_tree(path) if is_dir else stat.S_IFMT(path.lstat().st_mode)
    return tree


async def test_rename_matrix(cell: Cell, tmp_path: Path) -> None:
    """Every kind onto every kind, with every flag, within one directory and between two: errno and tree as locally."""
    a = await cell.connected()
    for number, (old, new, flags, across) in enumerate(itertools.product(KINDS, KINDS, FLAGS, (False, True))):
        what = f"{old} -> {new}, flags {flags}, across {across}"
        local = tmp_path / "local" / str(number)
        (local / "sub").mkdir(parents=True)
        remote = (await a.mkdir(b"%d" % number)).fid
        sub = (await a.mkdir(b"sub", remote)).fid
        make_local(local, old, "old")
        make_local(local / "sub" if across else local, new, "new")
        await make_remote(a, remote, old, b"old")
        await make_remote(a, sub if across else remote, new, b"new")
        expected = local_rename(local / "old", (local / "sub" if across else local) / "new", flags)
        try:
            await a.rename((remote, b"old"), (sub if across else remote, b"new"), flags)
            got = 0
        except Aborted as refusal:
            got = refusal.errno
        assert errno.errorcode.get(got) == errno.errorcode.get(expected), what
        assert await remote_tree(a, remote) == local_tree(local), what


async def test_rename_into_itself_and_onto_ancestors(cell: Cell) -> None:
    a = await cell.connected()
    d = (await a.mkdir(b"d")).fid
    e = (await a.mkdir(b"e", d)).fid
    f = (await a.mkdir(b"f", e)).fid
    assert await code(a.rename((a.root, b"d"), (a.root, b"d"), 1)) == AbortCode.EXIST
    assert await code(a.rename((a.root, b"d"), (d, b"x"))) == AbortCode.INVAL
    assert await code(a.rename((a.root, b"d"), (f, b"x"))) == AbortCode.INVAL
    assert await code(a.rename((e, b"f"), (a.root, b"d"))) == AbortCode.NOTEMPTY
    assert await code(a.rename((e, b"f"), (a.root, b"d"), 2)) == AbortCode.INVAL
    # After a move the parent pointers are the new ones.
    await a.rename((e, b"f"), (a.root, b"f"))
    await a.rename((a.root, b"d"), (f, b"d"))
    assert await code(a.rename((a.root, b"f"), (e, b"x"))) == AbortCode.INVAL


async def test_rename_of_two_names_of_one_file_does_nothing(cell: Cell) -> None:
    a = await cell.connected()
    f = await a.create(b"f")
    await a.link(f.fid, b"g")
    before = await a.stat(a.root)
    reply = await a.rename((a.root, b"f"), (a.root, b"g"))
    assert reply.replaced is None and reply.moved.status.nlink == 2
    assert await a.stat(a.root) == before


async def test_names_that_cannot_be(cell: Cell) -> None:
    """A hostile client's names do not get past the decoder."""
    a = await cell.connected()
    for name, expected in (
        (b"", AbortCode.BAD_MESSAGE),
        (b".", AbortCode.BAD_MESSAGE),
        (b"..", AbortCode.BAD_MESSAGE),
        (b"a/b", AbortCode.BAD_MESSAGE),
        (b"a\0b", AbortCode.BAD_MESSAGE),
        (b"x" * 256, AbortCode.NAMETOOLONG),
    ):
        with trio.fail_after(5):
            assert await code(a.call(CreateFile(a.op(), a.root, name, 0o644, 0, 0))) == expected
