"""Operations that change nothing: statuses, names, bytes, extended attributes, volumes."""

from __future__ import annotations

import os

import trio
from promisefs_protocol.abort import AbortCode, Aborted
from promisefs_protocol.ids import PromisedStatus
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
from promisefs_protocol.transport import Reply

from .breaker import Contact
from .operations import Operation, Operations, Parts, volume_entry

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

    async def fetch_status(self, contact: Contact, request: FetchStatus, bulk: bytes | None) -> Reply:
        return StatusReply(self.promised(contact, self._vnodes.get(request.fid))), None

    async def inline_bulk_status(self, contact: Contact, request: InlineBulkStatus, bulk: bytes | None) -> Reply:
        entries: list[PromisedStatus | int] = []
        for fid in request.fids:
            if entries and len(entries) % BULK_STATUS_STEP == 0:
                await trio.lowlevel.checkpoint()
            try:
                entries.append(self.promised(contact, self._vnodes.get(fid)))
            except Aborted as refusal:
                entries.append(int(refusal.code))
        return InlineBulkStatusReply(tuple(entries)), None

    async def lookup(self, contact: Contact, request: Lookup, bulk: bytes | None) -> Reply:
        directory = self._vnodes.directory(request.directory)
        entry = self._store.directories.lookup(directory, request.name)
        return (
            LookupReply(self.promised(contact, directory), None if entry is None else self.promised(contact, entry)),
            None,
        )

    async def fetch_directory(self, contact: Contact, request: FetchDirectory, bulk: bytes | None) -> Reply:
        directory = self._vnodes.directory(request.directory)
        limit = min(request.limit, MAX_PAGE_ENTRIES)
        page = self._store.directories.page(directory, request.after, limit + 1)
        entries = tuple([(name, self.promised(contact, vnode)) for name, vnode in page[:limit]])
        return FetchDirectoryReply(self.promised(contact, directory), entries, len(page) > limit), None

    async def fetch_data(self, contact: Contact, request: FetchData, bulk: bytes | None) -> Reply:
        """Status and promise first, then the bytes: they may be newer than their label, never older."""
        vnode = self._vnodes.get(request.fid)
        if vnode.is_dir:
            raise Aborted(AbortCode.ISDIR, f"{request.fid} is a directory")
        entry = self.promised(contact, vnode)
        length = max(0, min(request.length, entry.status.size - request.offset))
        if vnode.is_symlink or vnode.is_mount_point:
            target = self._vnodes.target(vnode.key)
            return StatusReply(entry), target[request.offset :][: request.length]
        return StatusReply(entry), await self._read(vnode.key, request.offset, length)

    async def _read(self, key: int, offset: int, length: int) -> bytearray:
        """Bytes of a data file; zeros where it has none."""
        data = bytearray(length)
        if not length:
            return data
        with self._store.files.pin(key, create=False) as file:
            if file is not None:
                view = memoryview(data)
                done = file.read_cached(view, offset)
                if done < length:
                    await trio.to_thread.run_sync(file.read_into, view[done:], offset + done, limiter=self._limiter)
        return data

    async def get_xattr(self, contact: Contact, request: GetXattr, bulk: bytes | None) -> Reply:
        return Empty(), self._store.xattrs.get(self._vnodes.get(request.fid), request.name)

    async def list_xattrs(self, contact: Contact, request: ListXattrs, bulk: bytes | None) -> Reply:
        return ListXattrsReply(self._store.xattrs.names(self._vnodes.get(request.fid))), None

    async def get_volume_status(self, contact: Contact, request: GetVolumeStatus, bulk: bytes | None) -> Reply:
        volume = self._store.volumes.get(request.volume)
        disk = os.statvfs(self._store.folder)
        return (
            GetVolumeStatusReply(
                volume.name, disk.f_frsize, disk.f_blocks, disk.f_bfree, disk.f_bavail, disk.f_files, disk.f_ffree
            ),
            None,
        )

    async def get_entry_by_name(self, contact: Contact, request: GetEntryByName, bulk: bytes | None) -> Reply:
        return volume_entry(self._store, self._store.volumes.by_name(request.name)), None

    async def get_entry_by_id(self, contact: Contact, request: GetEntryByID, bulk: bytes | None) -> Reply:
        return volume_entry(self._store, self._store.volumes.get(request.volume)), None
