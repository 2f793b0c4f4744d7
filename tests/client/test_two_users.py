"""Two users of one mount: what one has been told the other learns only if he may."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from pathlib import Path

import pyfuse3
import pytest
from client_mount import ClientMount, World, running_world, settled
from promisefs_client.identity.key import UserToken
from promisefs_protocol.ids import Fid
from promisefs_protocol.messages import FetchDirectory, FetchStatus, Lookup, StoreACL
from promisefs_protocol.rights import ALL_RIGHTS, LOOKUP, READ, AclEntry
from server_cell import Client

ALICE, BOB = 1001, 1002


class Context(pyfuse3.RequestContext):
    """Of a process of this user."""

    def __new__(cls, uid: int) -> Context:
        context = super().__new__(cls)
        context.uid = uid
        context.umask = 0
        return context

    uid = gid = pid = umask = 0


class Scene:
    """Directory d with file f, of which alice may do everything and bob nothing; both use one mount."""

    def __init__(self, world: World, mount: ClientMount, other: Client, d: Fid, f: Fid) -> None:
        self.world, self.mount, self.other, self.d, self.f = world, mount, other, d, f
        self.handlers = mount.operations

    async def set_acl(self, directory: Fid, **rights: int) -> None:
        entries = tuple(AclEntry(name.replace("_", ":"), bits, False) for name, bits in rights.items())
        await self.other.call(StoreACL(directory, entries, True))
        await settled()

    async def log_in(self, uid: int, name: str) -> None:
        registry = self.world.server.server.registry
        token, claims = registry.authority.issue(registry.principals.user(name), 3600, time.time())
        store = self.world.server.server.store.uuid
        self.mount.cell.keys.log_in(
            uid, store, UserToken(token, claims.user, name, claims.serial, "memory", claims.expires_s)
        )

    async def lookup(self, uid: int, parent: int, name: bytes) -> pyfuse3.EntryAttributes:
        return await self.handlers.lookup(parent, name, Context(uid))

    async def open(self, uid: int, flags: int = os.O_RDONLY) -> int:
        ino = self.mount.cell.table.ino(self.f)
        return int((await self.handlers.open(ino, flags, Context(uid))).fh)


@asynccontextmanager
async def scene(tmp_path: Path) -> AsyncIterator[Scene]:
    async with running_world(tmp_path) as world:
        registry = world.server.server.registry
        for uid, name in ((ALICE, "alice"), (BOB, "bob")):
            registry.principals.create_user(name, uid, 0)
        other = await world.server.connected()
        d = (await other.mkdir(b"d")).fid
        f = (await other.create(b"f", d)).fid
        await other.store(f, b"secret")
        await other.call(StoreACL(other.root, (AclEntry("system:authuser", int(LOOKUP), False),), True))
        await other.call(StoreACL(d, (AclEntry("alice", int(ALL_RIGHTS), False),), True))
        made = Scene(world, await world.mount(), other, d, f)
        await made.log_in(ALICE, "alice")
        await made.log_in(BOB, "bob")
        yield made


async def refused(awaitable: Awaitable[object], number: int = errno.EACCES) -> None:
    with pytest.raises(pyfuse3.FUSEError) as refusal:
        await awaitable
    assert refusal.value.errno == number


async def test_what_one_knows_the_other_does_not_learn(tmp_path: Path) -> None:
    async with scene(tmp_path) as s:
        d = (await s.lookup(ALICE, 1, b"d")).st_ino
        f = (await s.lookup(ALICE, d, b"f")).st_ino
        listing = await s.handlers.opendir(d, Context(ALICE))
        handle = await s.open(ALICE)
        assert bytes(await s.handlers.read(handle, 0, 100)) == b"secret"
        assert (await s.lookup(ALICE, d, b"nothing")).st_ino == 0
        sent = s.mount.session.sent
        sent.clear()
        await s.lookup(ALICE, d, b"f")
        await s.handlers.getattr(f, Context(ALICE))
        assert await s.handlers.access(f, os.R_OK, Context(ALICE))
        assert not sent, "she knows all that"
        await refused(s.lookup(BOB, d, b"f"))
        await refused(s.lookup(BOB, d, b"nothing"))
        await refused(s.handlers.getattr(f, Context(BOB)))
        await refused(s.handlers.opendir(d, Context(BOB)))
        await refused(s.handlers.access(f, os.F_OK, Context(BOB)))
        await refused(s.open(BOB))
        await refused(s.handlers.unlink(d, b"f", Context(BOB)))
        # The directory itself is in one that he may list.
        await s.handlers.getattr(d, Context(BOB))
        assert not await s.handlers.access(d, os.X_OK, Context(BOB))
        sent.clear()
        await refused(s.lookup(BOB, d, b"f"))
        await refused(s.lookup(BOB, d, b"nothing"))
        assert not sent, "his rights are known, and her names"
        await s.handlers.release(handle)
        await s.handlers.releasedir(listing)


async def test_rights_are_asked_for_once_by_each(tmp_path: Path) -> None:
    async with scene(tmp_path) as s:
        await s.set_acl(s.d, system_authuser=LOOKUP | READ)
        for uid in (ALICE, BOB):
            d = (await s.lookup(uid, 1, b"d")).st_ino
            await s.lookup(uid, d, b"f")
        s.mount.session.sent.clear()
        for uid in (ALICE, BOB, ALICE):
            d = (await s.lookup(uid, 1, b"d")).st_ino
            f = (await s.lookup(uid, d, b"f")).st_ino
            await s.handlers.getattr(f, Context(uid))
        assert not [r for r in s.mount.session.sent if isinstance(r, FetchStatus | Lookup | FetchDirectory)]


async def test_who_loses_the_right_reads_no_more_though_it_is_open(tmp_path: Path) -> None:
    async with scene(tmp_path) as s:
        d = (await s.lookup(ALICE, 1, b"d")).st_ino
        f = (await s.lookup(ALICE, d, b"f")).st_ino
        handle = await s.open(ALICE)
        await s.handlers.read(handle, 0, 100)
        s.mount.kernel.dropped.clear()
        await s.set_acl(s.d, alice=LOOKUP)
        assert any(work.ino == f and work.pages for work in s.mount.kernel.dropped), "a mapping must ask again"
        await refused(s.handlers.read(handle, 0, 100))
        await refused(s.open(ALICE))
        await s.set_acl(s.d, alice=READ | LOOKUP)
        assert bytes(await s.handlers.read(handle, 0, 100)) == b"secret"
        await s.handlers.release(handle)


async def test_who_keeps_the_right_keeps_the_pages(tmp_path: Path) -> None:
    async with scene(tmp_path) as s:
        d = (await s.lookup(ALICE, 1, b"d")).st_ino
        await s.lookup(ALICE, d, b"f")
        handle = await s.open(ALICE)
        await s.handlers.read(handle, 0, 100)
        s.mount.kernel.dropped.clear()
        s.mount.session.sent.clear()
        await s.set_acl(s.d, alice=READ | LOOKUP)
        assert not any(work.pages for work in s.mount.kernel.dropped)
        assert bytes(await s.handlers.read(handle, 0, 100)) == b"secret"
        await s.handlers.release(handle)


async def test_rights_end_with_the_token(tmp_path: Path) -> None:
    async with scene(tmp_path) as s:
        d = (await s.lookup(ALICE, 1, b"d")).st_ino
        f = (await s.lookup(ALICE, d, b"f")).st_ino
        keys = s.mount.cell.keys
        keys.log_out(ALICE)
        await refused(s.handlers.getattr(f, Context(ALICE)))
        await s.log_in(ALICE, "alice")
        await s.handlers.getattr(f, Context(ALICE))
        await s.log_in(ALICE, "bob")
        await refused(s.handlers.getattr(f, Context(ALICE)))
        await s.log_in(ALICE, "alice")
        await s.handlers.getattr(f, Context(ALICE))
        before = keys.of(ALICE).credentials
        keys.note_expired(time.time())
        assert keys.of(ALICE).credentials is before
        keys.note_expired(time.time() + 7200)
        assert keys.of(ALICE).credentials is not before


async def test_a_change_of_groups_ends_what_was_known(tmp_path: Path) -> None:
    async with scene(tmp_path) as s:
        principals = s.world.server.server.registry.principals
        staff = principals.create_group("staff", principals.find("system:administrators"), 0)
        principals.add(principals.find("bob"), staff)
        await s.set_acl(s.d, staff=READ | LOOKUP)
        d = (await s.lookup(BOB, 1, b"d")).st_ino
        f = (await s.lookup(BOB, d, b"f")).st_ino
        principals.remove(principals.find("bob"), staff)
        await s.world.server.server._announce_rights()
        await refused(s.handlers.getattr(f, Context(BOB)))


async def test_what_the_kernel_of_a_shared_mount_may_keep(tmp_path: Path) -> None:
    async with scene(tmp_path) as s:
        s.mount.cell.table.shared = True
        entry = await s.lookup(ALICE, 1, b"d")
        assert entry.entry_timeout == entry.attr_timeout == 0
        entry = await s.lookup(ALICE, entry.st_ino, b"f")
        assert entry.entry_timeout == entry.attr_timeout == 0
        for directory in (s.other.root, s.d):
            await s.set_acl(directory, system_anyuser=LOOKUP, alice=ALL_RIGHTS)
        entry = await s.lookup(ALICE, 1, b"d")
        assert entry.entry_timeout > 0 and entry.attr_timeout > 0
        entry = await s.lookup(ALICE, entry.st_ino, b"f")
        assert entry.entry_timeout > 0 and entry.attr_timeout > 0


async def test_owner_bits_count_at_open(tmp_path: Path) -> None:
    async with scene(tmp_path) as s:
        d = (await s.lookup(ALICE, 1, b"d")).st_ino
        flags = os.O_WRONLY | os.O_CREAT
        info, entry = await s.handlers.create(d, b"mine", 0o100444, flags, Context(ALICE))
        assert entry.st_uid == ALICE
        assert await s.handlers.write(info.fh, 0, b"filled by who made it") == 21
        await s.handlers.flush(info.fh)
        await s.handlers.release(info.fh)
        await refused(s.handlers.open(entry.st_ino, os.O_WRONLY, Context(ALICE)))
        info = await s.handlers.open(entry.st_ino, os.O_RDONLY, Context(ALICE))
        await s.handlers.release(info.fh)
