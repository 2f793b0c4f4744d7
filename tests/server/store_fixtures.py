"""Small stores that are kept for ever, with one of everything in them, and what a client sees there.

Run as a program it makes the one of today's schema version, see released_stores/README.md.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sqlite3
import sys
import tempfile
from contextlib import closing
from pathlib import Path
from typing import Any

import trio
from promisefs_protocol.ids import Fid
from promisefs_protocol.messages import (
    CreateVolume,
    FetchDirectory,
    GetEntryByName,
    GetXattr,
    ListXattrs,
    MakeMountPoint,
    SetXattr,
)
from promisefs_server.store.database import APPLICATION_ID
from promisefs_server.store.migrations import schema_version
from server_cell import Cell, Client, running_cell

RELEASED = Path(__file__).with_name("released_stores")
HOST = bytes(range(16))
"""The uuid of the client that has a removed file open."""
ORPHAN_BYTES = b"nobody can find me, but somebody has me open"


async def fill(cell: Cell) -> Fid:
    """Put one of everything into an empty store. Return the fid of the removed file that HOST has open."""
    await cell.administer(CreateVolume("projects"))
    a = await cell.connected(HOST)
    await a.store((await a.create(b"empty-then-short")).fid, b"short\n", sync=True)
    long = (await a.create(b"long", mode=0o100600)).fid
    await a.store(long, bytes(range(256)) * 40, sync=True)
    hole = (await a.create(b"hole")).fid
    await a.store(hole, b"behind a hole", 20_000)
    await a.truncate(hole, 30_000)
    await a.create(b"n\xe4me \xff\n")
    directory = (await a.mkdir(b"d", mode=0o40750)).fid
    await a.mkdir(b"inner", directory)
    await a.link(long, b"linked", directory)
    await a.symlink(b"symlink", b"d/linked")
    for name, value in ((b"user.a", b"\0binary\xff"), (b"user.b", b"")):
        await a.call(SetXattr(long, name, 0), value)
    await a.call(SetXattr(directory, b"user.d", 0), b"of a directory")
    await a.call(MakeMountPoint(a.op(), a.root, b"p", "projects"))
    projects = (await a.call(GetEntryByName("projects"))).root
    await a.store((await a.create(b"in projects", projects)).fid, b"another volume", sync=True)
    orphan = (await a.create(b"orphan")).fid
    await a.store(orphan, ORPHAN_BYTES, sync=True)
    await a.unlink(b"orphan", keep_open=True)
    return orphan


async def contents(client: Client, volume: str) -> dict[str, Any]:
    """What a client sees of a volume: by path, all that is to stay the same for ever."""
    root = (await client.call(GetEntryByName(volume))).root
    seen = {"/": await _described(client, root)}
    pending = [(root, "/")]
    while pending:
        directory, path = pending.pop()
        listing = await client.call(FetchDirectory(directory, b"", 100))
        assert not listing.more
        for name, entry in listing.entries:
            inner = path + name.decode(errors="surrogateescape").encode("unicode_escape").decode()
            seen[inner] = await _described(client, entry.fid)
            if entry.status.is_dir:
                pending.append((entry.fid, inner + "/"))
    return seen


async def _described(client: Client, fid: Fid) -> dict[str, Any]:
    status = (await client.stat(fid)).status
    names = (await client.call(ListXattrs(fid))).names
    xattrs = {name.decode(): (await client.calls.call(GetXattr(fid, name)))[1].hex() for name in names}  # type: ignore[union-attr]
    stays = status._asdict()
    del stays["incarnation"], stays["allocated"]
    described = {"fid": list(fid), **stays, "xattrs": xattrs}
    if not status.is_dir:
        described["sha256"] = hashlib.sha256(await client.fetch(fid)).hexdigest()
    return described


def freeze(folder: Path, fixture: Path) -> None:
    """Keep the closed store in `folder` as text and data files."""
    with closing(sqlite3.connect(folder / "store.sqlite")) as database:
        (version,) = database.execute("PRAGMA user_version").fetchone()
        lines = [f"PRAGMA application_id={APPLICATION_ID};", f"PRAGMA user_version={version};", *database.iterdump()]
    (fixture / "store.sql").write_text("\n".join(lines) + "\n")
    shutil.copytree(folder / "data", fixture / "data")


def thaw(fixture: Path, folder: Path) -> None:
    """Make the store in `folder` that was frozen."""
    folder.mkdir()
    with closing(sqlite3.connect(folder / "store.sqlite")) as database:
        database.executescript((fixture / "store.sql").read_text())
    shutil.copytree(fixture / "data", folder / "data")


async def _make(folder: Path, fixture: Path) -> None:
    async with running_cell(folder) as cell:
        orphan = await fill(cell)
        client = await cell.connected(HOST)
        client.open_fids.add(orphan)
        seen: dict[str, Any] = {name: await contents(client, name) for name in ("root", "projects")}
        seen["orphan"] = list(orphan)
    freeze(folder, fixture)
    (fixture / "contents.json").write_text(json.dumps(seen, indent=1) + "\n")


if __name__ == "__main__":
    made = RELEASED / f"version-{schema_version()}"
    if made.exists():
        sys.exit(f"{made} exists, and is never made anew")
    made.mkdir()
    with tempfile.TemporaryDirectory() as temporary:
        trio.run(_make, Path(temporary) / "store", made)
