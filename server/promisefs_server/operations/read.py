"""Operations that change nothing: statuses, names, bytes, extended attributes, volumes."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from functools import partial

import trio
from promisefs_protocol.abort import AbortCode, Aborted
from promisefs_protocol.ids import Fid, PromisedStatus
from promisefs_protocol.messages import (
    Empty,
    FetchData,
    FetchDirectory,
    FetchDirectoryReply,
    FetchStatus,
    GetEntryByID,
    GetEntryByName,
    GetVolumeStatus,
    GetVolumeStatusReply,
    GetXattr,
    InlineBulkStatus,
    InlineBulkStatusReply,
    ListXattrs,
    ListXattrsReply,
    Lookup,
    LookupReply,
    StatusReply,
)
from promisefs_protocol.rights import Rights
from promisefs_protocol.transport import Reply

from promisefs_server.identity.caller import Caller
from promisefs_server.store.vnodes import Vnode

from .parts import Later, Operation, Operations, Parts, volume_entry

MAX_PAGE_ENTRIES = 1024
"""Most entries in one FetchDirectory reply, whatever the client asks for: what is done in one step."""
BULK_STATUS_STEP = 128
"""So many statuses of an InlineBulkStatus are taken in one step."""
READ_THREADS = 8


class ReadOperations(Operations):
    def __init__(self, parts: Parts) -> None:
        super().__init__(parts)
        self._limiter = trio.CapacityLimiter(READ_THREADS)

    def table(self) -> dict[type, Operation]:
        return {
            FetchStatus: self.fetch_status,
            InlineBulkStatus: self.inline_bulk_status,
            Lookup: self.lookup,
            FetchDirectory: self.fetch_directory,
            FetchData: self.fetch_data,
            GetXattr: self.get_xattr,
            ListXattrs: self.list_xattrs,
            GetVolumeStatus: self.get_volume_status,
            GetEntryByName: self.get_entry_by_name,
            GetEntryByID: self.get_entry_by_id,
        }

    def fetch_status(self, caller: Caller, request: FetchStatus, bulk: bytes | None) -> Reply:
        return StatusReply(self._told(caller, request.fid)), None

    def inline_bulk_status(self, caller: Caller, request: InlineBulkStatus, bulk: bytes | None) -> Reply | Later:
        if len(request.fids) <= BULK_STATUS_STEP:
            return InlineBulkStatusReply(tuple(self._statuses(caller, request.fids))), None
        return partial(self._many_statuses, caller, request.fids)

    async def _many_statuses(self, caller: Caller, fids: Sequence[Fid]) -> Reply:
        entries: list[PromisedStatus | int] = []
        for start in range(0, len(fids), BULK_STATUS_STEP):
            await trio.lowlevel.checkpoint()
            entries += self._statuses(caller, fids[start : start + BULK_STATUS_STEP])
        return InlineBulkStatusReply(tuple(entries)), None

    def _told(self, caller: Caller, fid: Fid) -> PromisedStatus:
        vnode = self._vnodes.get(fid)
        self._access.need_status(caller.identity, vnode)
        return self.promised(caller, vnode)

    def _statuses(self, caller: Caller, fids: Iterable[Fid]) -> Iterator[PromisedStatus | int]:
        for fid in fids:
            try:
                yield self._told(caller, fid)
            except Aborted as refusal:
                yield int(refusal.code)

    def lookup(self, caller: Caller, request: Lookup, bulk: bytes | None) -> Reply:
        directory = self.directory(caller, request.directory, Rights.LOOKUP)
        entry = self._store.directories.lookup(directory, request.name)
        return (
            LookupReply(self.promised(caller, directory), None if entry is None else self.promised(caller, entry)),
            None,
        )

    def fetch_directory(self, caller: Caller, request: FetchDirectory, bulk: bytes | None) -> Reply:
        directory = self.directory(caller, request.directory, Rights.LOOKUP)
        limit = min(request.limit, MAX_PAGE_ENTRIES)
        page = self._store.directories.page(directory, request.after, limit + 1)
        entries = tuple([(name, self.promised(caller, vnode)) for name, vnode in page[:limit]])
        return FetchDirectoryReply(self.promised(caller, directory), entries, len(page) > limit), None

    def fetch_data(self, caller: Caller, request: FetchData, bulk: bytes | None) -> Reply | Later:
        """Status and promise first, then the bytes: they may be newer than their label, never older."""
        vnode, entry, data = self._begin_fetch(caller, request)
        if vnode.is_symlink or vnode.is_mount_point:
            target = self._vnodes.target(vnode.key)
            return StatusReply(entry), target[request.offset :][: request.length]
        if data:
            with self.data_file(self._vnodes.shown(vnode), create=False) as file:
                if file is not None and file.read_cached(memoryview(data), request.offset) < len(data):
                    return partial(self._fetch_from_disk, caller, request)
        return StatusReply(entry), data

    def _begin_fetch(self, caller: Caller, request: FetchData) -> tuple[Vnode, PromisedStatus, bytearray]:
        """Return the vnode, what is told of it, and zeros for what is to be read."""
        vnode = self._vnodes.get(request.fid)
        if vnode.is_dir:
            raise Aborted(AbortCode.ISDIR, f"{request.fid} is a directory")
        self._access.need_read(caller.identity, vnode)
        entry = self.promised(caller, vnode)
        return vnode, entry, bytearray(max(0, min(request.length, entry.status.size - request.offset)))

    async def _fetch_from_disk(self, caller: Caller, request: FetchData) -> Reply:
        vnode, entry, data = self._begin_fetch(caller, request)
        if data:
            with self.data_file(self._vnodes.shown(vnode), create=False) as file:
                if file is not None:
                    into = memoryview(data)
                    await trio.to_thread.run_sync(file.read_into, into, request.offset, limiter=self._limiter)
        return StatusReply(entry), data

    def get_xattr(self, caller: Caller, request: GetXattr, bulk: bytes | None) -> Reply:
        return Empty(), self._store.xattrs.get(self._readable(caller, request.fid), request.name)

    def list_xattrs(self, caller: Caller, request: ListXattrs, bulk: bytes | None) -> Reply:
        return ListXattrsReply(self._store.xattrs.names(self._readable(caller, request.fid))), None

    def _readable(self, caller: Caller, fid: Fid) -> Vnode:
        vnode = self._vnodes.get(fid)
        self._access.need_read(caller.identity, vnode)
        return vnode

    def get_volume_status(self, caller: Caller, request: GetVolumeStatus, bulk: bytes | None) -> Reply:
        volume = self._store.volumes.get(request.volume)
        root = self._vnodes.find(volume.root)
        if root is not None:
            self._access.need_status(caller.identity, root)
        disk = os.statvfs(self._store.folder)
        free, available, blocks = disk.f_bfree, disk.f_bavail, disk.f_blocks
        used = self._store.volumes.usage_bytes(volume.volume)
        if volume.quota_bytes:
            blocks = min(blocks, volume.quota_bytes // disk.f_frsize)
            left = max(0, volume.quota_bytes - used) // disk.f_frsize
            free, available = min(free, left), min(available, left)
        reply = GetVolumeStatusReply(
            volume.name, disk.f_frsize, blocks, free, available, disk.f_files, disk.f_ffree,
            volume.quota_bytes, used, volume.read_only,
        )  # fmt: skip
        return reply, None

    def get_entry_by_name(self, caller: Caller, request: GetEntryByName, bulk: bytes | None) -> Reply:
        return volume_entry(self._store, self._store.volumes.by_name(request.name)), None

    def get_entry_by_id(self, caller: Caller, request: GetEntryByID, bulk: bytes | None) -> Reply:
        return volume_entry(self._store, self._store.volumes.get(request.volume)), None
