"""Every call of the protocol: its name, its arguments, its reply.

Methods keep AFS's names. Names that AFS does not have: HELLO, CB.RenewLease, FS.Sync, FS.AppendData, FS.Fallocate,
FS.Seek, FS.CopyRange, FS.GiveUpOpen, FS.GetLock, FS.CancelLock, CB.AnswerLocks, mount points, the xattr calls, and
RenameVolume. A request or reply is a NamedTuple; bulk bytes (file contents, xattr values) travel beside it, see
`connection`. Directions: FS.* and VL.* from the client on its *calls* connection; CB.RenewLease from the client, every
other CB.* from the server, on the client's *callbacks* connection; statistics and the administration of volumes on the
server's control socket only, a Unix socket in its store, without HELLO.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

from .fields import NameCheck, decoder, int_range, length_range
from .identity_messages import (
    AddToGroup,
    ChangeOwner,
    CreateGroup,
    CreateUser,
    DeletePrincipal,
    Examine,
    ExamineReply,
    Forget,
    IdToName,
    IdToNameReply,
    IssuedToken,
    IssueToken,
    ListEntries,
    ListEntriesReply,
    ListMembership,
    ListMembershipReply,
    Login,
    NameToId,
    NameToIdReply,
    Present,
    PresentReply,
    RemoveFromGroup,
    RenamePrincipal,
    RevokeTokens,
    RotateKeys,
    SetDisabled,
    SetPassword,
)
from .ids import (
    MAX_FILE_BYTES,
    MAX_NAME_BYTES,
    MAX_SYMLINK_BYTES,
    MAX_XATTR_NAME_BYTES,
    U32,
    U64,
    Fid,
    Mode,
    PromisedStatus,
    Size,
    TimeNs,
    Uuid,
)
from .locks import HeldLock, Lock, LockOwner
from .rights import AclEntries

PROTOCOL_VERSION = 2
MAX_BULK_BYTES = 1 << 20
"""Most file data in one FetchData or StoreData."""
MAX_LIST = 4096
"""Most elements in one list of fids, breaks or entries."""

Name = Annotated[bytes, NameCheck(MAX_NAME_BYTES)]
NameOrEmpty = Annotated[bytes, length_range(0, MAX_NAME_BYTES)]
XattrName = Annotated[bytes, length_range(1, MAX_XATTR_NAME_BYTES)]
Target = Annotated[bytes, length_range(1, MAX_SYMLINK_BYTES)]
Text = Annotated[str, length_range(0, 255)]
BulkSize = Annotated[int, int_range(0, MAX_BULK_BYTES)]
Fids = Annotated[tuple[Fid, ...], length_range(0, MAX_LIST)]


class Operation(NamedTuple):
    """Makes a mutation of names happen exactly once, however often the call is repeated.

    The server remembers the reply of each (client, number), in the transaction of the mutation itself, until
    the client says with `done_below` that it needs it no longer.
    `repeated` marks a call that may have been made before.
    """

    number: U64
    done_below: U64
    repeated: bool


# Replies that several calls share.


class Empty(NamedTuple):
    """Nothing to say."""


class StatusReply(NamedTuple):
    entry: PromisedStatus


class EntryReply(NamedTuple):
    """The directory after the operation, and what its name now stands for."""

    directory: PromisedStatus
    entry: PromisedStatus


# HELLO


class Role(enum.StrEnum):
    CALLS = "calls"
    CALLBACKS = "callbacks"
    COMMANDS = "commands"  # of no mount: SEC and PT only


class Hello(NamedTuple):
    """First call on every connection. A client opens its callbacks connection first."""

    magic: Text  # "promisefs"
    oldest_version: U32
    newest_version: U32
    client: Uuid  # of this mount; new at each mount
    role: Text  # a Role
    description: Text  # for people: host, mountpoint


START_ID_BITS = 32


class HelloReply(NamedTuple):
    version: U32
    server: Uuid
    server_start: U64  # of this run of the server: how often it was started << START_ID_BITS | random bits
    lease_ms: U32
    break_wait_ms: U32  # how long the server would wait for a break's acknowledgement at most


# FS: status and data


class FetchStatus(NamedTuple):
    fid: Fid


class InlineBulkStatus(NamedTuple):
    fids: Fids


class InlineBulkStatusReply(NamedTuple):
    """One for each fid asked for, in that order: its status, or the abort code that FetchStatus would give."""

    entries: Annotated[tuple[PromisedStatus | U32, ...], length_range(0, MAX_LIST)]


class Lookup(NamedTuple):
    directory: Fid
    name: Name


class LookupReply(NamedTuple):
    """`entry` is None if the directory has no such name; the directory's promise covers that too."""

    directory: PromisedStatus
    entry: PromisedStatus | None


class FetchDirectory(NamedTuple):
    """Names after `after` in byte order, with statuses and promises."""

    directory: Fid
    after: NameOrEmpty
    limit: Annotated[int, int_range(1, MAX_LIST)]


class FetchDirectoryReply(NamedTuple):
    """Pages of one listing belong together only if the directory's data version is the same in all."""

    directory: PromisedStatus
    entries: Annotated[tuple[tuple[Name, PromisedStatus], ...], length_range(0, MAX_LIST)]
    more: bool


class FetchData(NamedTuple):
    """Bytes of a file, a symlink's target, or a mount point's volume name; the reply is short only at the end.

    The status in the reply was taken *before* the bytes were read: bytes may be newer than its
    data version, never older.
    """

    fid: Fid
    offset: Size
    length: BulkSize


class FileVersion(NamedTuple):
    incarnation: U64  # of the volume
    data_version: U64


class StoreData(NamedTuple):
    """Write the bulk bytes at `offset`. With `sync` they are durable when the reply comes.

    `since`: abort CHANGED if another client has changed the bytes of the file after that version, or if that is not
    known. It is given when some of the bulk is what the file is taken to have there anyway.
    """

    fid: Fid
    offset: Size
    mtime_ns: TimeNs | None  # None: the server's clock
    sync: bool
    since: FileVersion | None = None


class AppendData(NamedTuple):
    """Write the bulk bytes at the end of the file, wherever that is. Happens once, however often it is repeated.

    The reply comes before other clients have acknowledged what they are told: the caller may be holding up what one of
    them waits for. FS.Sync with `seen` waits for it.
    """

    operation: Operation
    fid: Fid
    mtime_ns: TimeNs | None  # None: the server's clock


class AppendDataReply(NamedTuple):
    entry: PromisedStatus
    offset: Size  # where the bytes are


class StoreStatus(NamedTuple):
    """Change what is not None. `size` truncates or extends; then mtime_ns None means the server's clock."""

    fid: Fid
    mode: Annotated[int, int_range(0, 0o7777)] | None
    uid: U32 | None
    gid: U32 | None
    size: Size | None
    atime_ns: TimeNs | None
    mtime_ns: TimeNs | None


class Fallocate(NamedTuple):
    """fallocate(2): reserve the range on the server's disk, or make it zeros, reserved or not, by `mode`.

    Aborts NOTSUP for any other mode, or if the server's disk cannot reserve.
    """

    fid: Fid
    mode: U32  # FallocateMode
    offset: Size
    length: Annotated[int, int_range(1, MAX_FILE_BYTES)]


class FallocateMode(enum.IntFlag):
    """linux/falloc.h. PUNCH_HOLE only with KEEP_SIZE."""

    ALLOCATE = 0
    KEEP_SIZE = 1
    PUNCH_HOLE = 2
    ZERO_RANGE = 16


class Seek(NamedTuple):
    """Where the next byte of data is, at `offset` or behind it, or the next hole; the end counts as one."""

    fid: Fid
    offset: Size
    hole: bool


class SeekReply(NamedTuple):
    """`offset` is None if there is none: only holes follow, or the file ends before."""

    entry: PromisedStatus
    offset: Size | None


class CopyRange(NamedTuple):
    """Copy bytes of one file into another one of the volume, or to another range of the same, which must not overlap.

    Aborts XDEV if the two are of different volumes.
    """

    fid: Fid  # of the target
    offset: Size
    source: Fid
    source_offset: Size
    length: Size


class CopyRangeReply(NamedTuple):
    """`copied`: less than `length` where the source ends, and at the server's discretion; 0 only at the end."""

    entry: PromisedStatus  # of the target
    copied: Size


class Sync(NamedTuple):
    """`durable`: make durable whatever the server has accepted for these files, and every change of names so far.
    `seen`: wait until every other client has acknowledged what it has been told so far, or its lease has ended.
    """

    fids: Fids
    durable: bool = True
    seen: bool = False


# FS: names


class CreateFile(NamedTuple):
    """A regular file, fifo or socket, by the type bits of `mode`. Aborts EXIST if the name is taken."""

    operation: Operation
    directory: Fid
    name: Name
    mode: Mode
    uid: U32
    gid: U32


class MakeDir(NamedTuple):
    operation: Operation
    directory: Fid
    name: Name
    mode: Mode
    uid: U32
    gid: U32


class Symlink(NamedTuple):
    operation: Operation
    directory: Fid
    name: Name
    target: Target
    uid: U32
    gid: U32


class MakeMountPoint(NamedTuple):
    """A name that stands for the root of the volume of this name, which need not exist, nor on this server."""

    operation: Operation
    directory: Fid
    name: Name
    volume_name: Text


class Link(NamedTuple):
    operation: Operation
    fid: Fid
    directory: Fid
    name: Name


class RemoveFile(NamedTuple):
    """`not_open`: the caller does not have this file open. Any other, if this was its last link, is kept for the caller
    until GiveUpOpen: the name may stand for another file by now than the one that the caller knows."""

    operation: Operation
    directory: Fid
    name: Name
    not_open: Fid | None


class RemoveFileReply(NamedTuple):
    """`entry` is the file that lost a name, as it is now: its nlink is 0 if it has none left."""

    directory: PromisedStatus
    entry: PromisedStatus


class RemoveDir(NamedTuple):
    operation: Operation
    directory: Fid
    name: Name


class RemoveDirReply(NamedTuple):
    directory: PromisedStatus
    removed: Fid


class RemoveMountPoint(NamedTuple):
    """The only way to remove one: RemoveFile, RemoveDir and renaming over it abort BUSY. The volume stays as it is."""

    operation: Operation
    directory: Fid
    name: Name


class RenameFlags(enum.IntFlag):
    """renameat2(2)."""

    NONE = 0
    NOREPLACE = 1
    EXCHANGE = 2


class Rename(NamedTuple):
    """`not_open` as in RemoveFile, for the file that is renamed over."""

    operation: Operation
    old_directory: Fid
    old_name: Name
    new_directory: Fid
    new_name: Name
    flags: Annotated[int, int_range(0, 3)]
    not_open: Fid | None


class RenameReply(NamedTuple):
    """`moved` now has the new name; `replaced` had it before: exchanged, or one link less (nlink 0: gone)."""

    old_directory: PromisedStatus
    new_directory: PromisedStatus
    moved: PromisedStatus
    replaced: PromisedStatus | None


# FS: access control lists


class FetchACL(NamedTuple):
    """The list of a directory, or of the directory whose list a file uses."""

    fid: Fid


class FetchACLReply(NamedTuple):
    entry: PromisedStatus
    acl: AclEntries


class StoreACL(NamedTuple):
    """Change what the list of a directory gives these users and groups; with `clear` nobody else is left in it.

    Aborts NOENT if there is no such user or group, NOTDIR for a file.
    """

    fid: Fid
    acl: AclEntries
    clear: bool


class WhoAmI(NamedTuple):
    """Who does the server that has this volume take the caller for?"""

    volume: U32


class WhoAmIReply(NamedTuple):
    user: Annotated[int, int_range(-(2**31), 2**31 - 1)]  # PT id; 0: whoever runs the server
    name: Text
    groups: Annotated[tuple[Text, ...], length_range(0, MAX_LIST)]


# FS: extended attributes (user.* only)


class GetXattr(NamedTuple):
    """The value comes as bulk. Aborts NODATA if there is none."""

    fid: Fid
    name: XattrName


class ListXattrs(NamedTuple):
    fid: Fid


class ListXattrsReply(NamedTuple):
    names: Annotated[tuple[XattrName, ...], length_range(0, MAX_LIST)]


class XattrFlags(enum.IntFlag):
    """setxattr(2)."""

    NONE = 0
    CREATE = 1
    REPLACE = 2


class SetXattr(NamedTuple):
    """The value is the bulk."""

    fid: Fid
    name: XattrName
    flags: Annotated[int, int_range(0, 2)]


class RemoveXattr(NamedTuple):
    fid: Fid
    name: XattrName


# FS: locks


class SetLock(NamedTuple):
    """Have the owner hold this lock, in place of what it holds of that range.

    Aborts AGAIN if another's is in the way and the caller does not `wait`, DEADLK if waiting would never end, NOLCK at
    a limit. A flock of the other kind is given up first, whatever becomes of this call. A repeated call finds its place
    in the queue by `request`, the caller's own number for it.
    """

    fid: Fid
    owner: LockOwner
    lock: Lock
    request: U64
    wait: bool


class SetLockReply(NamedTuple):
    """Not `granted`: it waits, and CB.AnswerLocks tells.

    `order` grows with each change of a lock at this run of the server, whatever connections the replies take.
    """

    order: U64
    granted: bool


class CancelLock(NamedTuple):
    """The caller does not want to wait any longer. Replied `granted` if the owner has the lock by now, and keeps it."""

    fid: Fid
    owner: LockOwner
    lock: Lock
    request: U64


class ReleaseLock(NamedTuple):
    """The owner holds nothing of this range from now on. What waits goes on waiting."""

    fid: Fid
    owner: LockOwner
    start: Size
    end: Size


class ReleaseLockReply(NamedTuple):
    order: U64


class GetLock(NamedTuple):
    """What would be in the way of this lock?"""

    fid: Fid
    owner: LockOwner
    lock: Lock


class GetLockReply(NamedTuple):
    """The first, or None. Its pid is 0 if it is another client's."""

    lock: Lock | None


class ExtendLock(NamedTuple):
    """Said after every HELLO on *calls*, before anything else that could need a lock: what the client holds.

    `reclaim`: the run of the server that gave the locks is over, and the lease never ended since. `done`: that is all.
    """

    locks: Annotated[tuple[HeldLock, ...], length_range(0, MAX_LIST)]
    reclaim: bool
    done: bool


class ExtendLockReply(NamedTuple):
    """Positions in the list of the locks that the client does not hold any more."""

    lost: Annotated[tuple[U32, ...], length_range(0, MAX_LIST)]


# FS: promises and volumes


class GiveUpCallBacks(NamedTuple):
    fids: Fids


class GiveUpAllCallBacks(NamedTuple):
    """The client goes away: forget it and everything kept for it."""


class GiveUpOpen(NamedTuple):
    """These unlinked files are no longer open at the client."""

    fids: Fids


class GetVolumeStatus(NamedTuple):
    volume: U32


class GetVolumeStatusReply(NamedTuple):
    name: Text
    block_bytes: U32
    blocks: U64
    blocks_free: U64
    blocks_available: U64
    files: U64
    files_free: U64
    quota: U64  # the most that `used` may grow to; 0: no bound
    used: U64  # the sizes of all that is in the volume, and 1024 for each
    read_only: bool


class SetVolumeStatus(NamedTuple):
    """For administrators; `quota` in bytes, 0: no bound."""

    volume: U32
    quota: Annotated[int, int_range(0, 2**62 - 1)]


class GetEntryByName(NamedTuple):
    """Aborts VNOVOL if no volume of this server has the name; another server may have it."""

    name: Text


class GetEntryByID(NamedTuple):
    """Aborts VNOVOL, or VMOVED if the volume was here and is now on another server."""

    volume: U32


class VolumeEntry(NamedTuple):
    """A volume of the server that was asked, and where its tree begins."""

    name: Text
    volume: U32
    root: Fid


# VL: administration, from the server's own machine only


class CreateVolume(NamedTuple):
    """Aborts EXIST if a volume has the name, INVAL if it can be none's."""

    name: Text


class ListVolumes(NamedTuple):
    """Volumes with a greater number than `after`."""

    after: U32


class VolumeInfo(NamedTuple):
    name: Text
    volume: U32
    files: U64  # vnodes of whatever type, the root directory and unlinked files among them
    size: U64  # of all regular files together, in bytes, holes included
    moved_to: Text  # where the volume is now; empty: here
    quota: U64  # 0: no bound
    read_only: bool


class ListVolumesReply(NamedTuple):
    volumes: Annotated[tuple[VolumeInfo, ...], length_range(0, MAX_LIST)]
    more: bool


class RemoveVolume(NamedTuple):
    """With everything in it. Aborts VNOVOL, PERM for the root volume."""

    name: Text


class GetStatistics(NamedTuple):
    """What the server counts, and whom it waits for. The bulk of the reply is a JSON object, see docs/observing.md."""


class RenameVolume(NamedTuple):
    """Aborts VNOVOL, EXIST, INVAL, PERM for the root volume."""

    name: Text
    new_name: Text


class SetVolume(NamedTuple):
    """What is None stays as it is. Aborts VNOVOL."""

    name: Text
    quota: U64 | None  # bytes; 0: no bound
    read_only: bool | None


# CB


class RenewLease(NamedTuple):
    """From the client, on the callbacks connection: I am here; my promises stay good for one lease more."""


class Changed(enum.IntFlag):
    """What a break says of a fid."""

    STATUS = 1
    DATA = 2  # bytes of a file, names of a directory
    DELETED = 4  # its last name is gone


class Break(NamedTuple):
    fid: Fid
    changed: Annotated[int, int_range(1, 7)]
    data_version: U64
    size: Size = 0  # of a file, now: a mapping that may reach beyond its old end has to be told


class CallBack(NamedTuple):
    breaks: Annotated[tuple[Break, ...], length_range(0, MAX_LIST)]


class CallBackReply(NamedTuple):
    """Acknowledges that nothing older will be shown. `still_open`: the deleted ones that are open here."""

    still_open: Fids


class InitCallBackState3(NamedTuple):
    """Forget every promise of this server's."""

    server: Uuid


class LockAnswer(NamedTuple):
    """`code` 0: the lock has been granted; else the abort code that SetLock would have given."""

    request: U64
    order: U64
    code: U32


class AnswerLocks(NamedTuple):
    """SetLock calls that had to wait need not any longer. Lost with the connection: SetLock is then repeated."""

    answers: Annotated[tuple[LockAnswer, ...], length_range(0, MAX_LIST)]


class Probe(NamedTuple):
    """Are you there?"""


@dataclass(frozen=True)
class Method:
    name: str
    request: type[Any]
    reply: type[Any]
    names_once: bool
    """Changes names, or appends, and must not happen twice: its first argument is an Operation."""

    decode_request: Callable[[object], Any]
    decode_reply: Callable[[object], Any]


def _method(name: str, request: type[Any], reply: type[Any], names_once: bool = False) -> Method:
    return Method(name, request, reply, names_once, decoder(request), decoder(reply))


_METHODS = (
    _method("HELLO", Hello, HelloReply),
    _method("FS.FetchStatus", FetchStatus, StatusReply),
    _method("FS.InlineBulkStatus", InlineBulkStatus, InlineBulkStatusReply),
    _method("FS.Lookup", Lookup, LookupReply),
    _method("FS.FetchDirectory", FetchDirectory, FetchDirectoryReply),
    _method("FS.FetchData", FetchData, StatusReply),
    _method("FS.StoreData", StoreData, StatusReply),
    _method("FS.AppendData", AppendData, AppendDataReply, True),
    _method("FS.StoreStatus", StoreStatus, StatusReply),
    _method("FS.Fallocate", Fallocate, StatusReply),
    _method("FS.Seek", Seek, SeekReply),
    _method("FS.CopyRange", CopyRange, CopyRangeReply),
    _method("FS.Sync", Sync, Empty),
    _method("FS.FetchACL", FetchACL, FetchACLReply),
    _method("FS.StoreACL", StoreACL, StatusReply),
    _method("FS.WhoAmI", WhoAmI, WhoAmIReply),
    _method("FS.CreateFile", CreateFile, EntryReply, True),
    _method("FS.MakeDir", MakeDir, EntryReply, True),
    _method("FS.Symlink", Symlink, EntryReply, True),
    _method("FS.MakeMountPoint", MakeMountPoint, EntryReply, True),
    _method("FS.Link", Link, EntryReply, True),
    _method("FS.RemoveFile", RemoveFile, RemoveFileReply, True),
    _method("FS.RemoveDir", RemoveDir, RemoveDirReply, True),
    _method("FS.RemoveMountPoint", RemoveMountPoint, RemoveFileReply, True),
    _method("FS.Rename", Rename, RenameReply, True),
    _method("FS.GetXattr", GetXattr, Empty),
    _method("FS.ListXattrs", ListXattrs, ListXattrsReply),
    _method("FS.SetXattr", SetXattr, StatusReply),
    _method("FS.RemoveXattr", RemoveXattr, StatusReply),
    _method("FS.SetLock", SetLock, SetLockReply),
    _method("FS.CancelLock", CancelLock, SetLockReply),
    _method("FS.ReleaseLock", ReleaseLock, ReleaseLockReply),
    _method("FS.GetLock", GetLock, GetLockReply),
    _method("FS.ExtendLock", ExtendLock, ExtendLockReply),
    _method("FS.GiveUpCallBacks", GiveUpCallBacks, Empty),
    _method("FS.GiveUpAllCallBacks", GiveUpAllCallBacks, Empty),
    _method("FS.GiveUpOpen", GiveUpOpen, Empty),
    _method("FS.GetVolumeStatus", GetVolumeStatus, GetVolumeStatusReply),
    _method("FS.SetVolumeStatus", SetVolumeStatus, Empty),
    _method("FS.GetStatistics", GetStatistics, Empty),
    _method("VL.GetEntryByName", GetEntryByName, VolumeEntry),
    _method("VL.GetEntryByID", GetEntryByID, VolumeEntry),
    _method("VL.CreateVolume", CreateVolume, VolumeEntry),
    _method("VL.ListVolumes", ListVolumes, ListVolumesReply),
    _method("VL.RemoveVolume", RemoveVolume, Empty),
    _method("VL.RenameVolume", RenameVolume, VolumeEntry),
    _method("VL.SetVolume", SetVolume, VolumeEntry),
    _method("SEC.Present", Present, PresentReply),
    _method("SEC.Forget", Forget, Empty),
    _method("SEC.Login", Login, IssuedToken),
    _method("SEC.SetPassword", SetPassword, Empty),
    _method("SEC.RevokeTokens", RevokeTokens, Empty),
    _method("SEC.SetDisabled", SetDisabled, Empty),
    _method("SEC.RotateKeys", RotateKeys, Empty),
    _method("SEC.IssueToken", IssueToken, IssuedToken),
    _method("PT.CreateUser", CreateUser, ExamineReply),
    _method("PT.CreateGroup", CreateGroup, ExamineReply),
    _method("PT.Delete", DeletePrincipal, Empty),
    _method("PT.Rename", RenamePrincipal, ExamineReply),
    _method("PT.ChangeOwner", ChangeOwner, ExamineReply),
    _method("PT.AddToGroup", AddToGroup, Empty),
    _method("PT.RemoveFromGroup", RemoveFromGroup, Empty),
    _method("PT.ListMembership", ListMembership, ListMembershipReply),
    _method("PT.Examine", Examine, ExamineReply),
    _method("PT.ListEntries", ListEntries, ListEntriesReply),
    _method("PT.NameToID", NameToId, NameToIdReply),
    _method("PT.IDToName", IdToName, IdToNameReply),
    _method("CB.RenewLease", RenewLease, Empty),
    _method("CB.CallBack", CallBack, CallBackReply),
    _method("CB.InitCallBackState3", InitCallBackState3, Empty),
    _method("CB.AnswerLocks", AnswerLocks, Empty),
    _method("CB.Probe", Probe, Empty),
)

METHODS: dict[str, Method] = {m.name: m for m in _METHODS}
METHOD_OF_REQUEST: dict[type[Any], Method] = {m.request: m for m in _METHODS}
MUTATIONS = (
    StoreData,
    AppendData,
    StoreStatus,
    StoreACL,
    Fallocate,
    CopyRange,
    SetXattr,
    RemoveXattr,
    CreateFile,
    MakeDir,
    MakeMountPoint,
    Symlink,
    Link,
    RemoveFile,
    RemoveDir,
    RemoveMountPoint,
    Rename,
)
"""What changes something in the volume of the first fid that it names."""
CONTROL_METHODS = frozenset(
    {
        "FS.GetStatistics",
        "VL.CreateVolume",
        "VL.ListVolumes",
        "VL.RemoveVolume",
        "VL.RenameVolume",
        "VL.SetVolume",
        "SEC.IssueToken",
    }
)
"""Served on a server's control socket, and nowhere else."""


def fids_of(request: Any) -> Iterator[Fid]:
    """The fids in a call's arguments, in their order."""
    for argument in request:
        if isinstance(argument, Fid):
            yield argument
        elif isinstance(argument, tuple):
            yield from (item for item in argument if isinstance(item, Fid))
