"""The vnode table: who knows what, under which promise, and what a break does to it.

Core: no I/O; `now` is the client's monotonic clock in seconds; what must be done in the kernel is returned
as `KernelWork` or collected in `found_stale`. Every method is atomic: no task can see a step half done.

Validity. A vnode may be served from cache iff its promise has not run out *and* the lease of its volume's server runs
*and* no break came since (a break clears the promise). Everything else asks the server first.

Servers. A break, a reset or a lost lease concerns only vnodes of the server that it comes from (`servers`).

Invariants
I1  A promise is installed only together with the status it is for, in one step, and only if neither a break of that
    fid nor a reset (InitCallBackState3, lost lease) came after the call that brought it was sent. A break for a fid
    that is not in the table counts too: `_broken` remembers it while a call from before is in flight.
I2  Statuses of one fid are applied in the order of ctime, within one incarnation of the volume.
I3  Clean blocks of a file carry the version label they were read under; when a status with another version is
    applied they go, unless our own store made exactly that change.
I4  Cached names of a directory belong to one data version; an own change edits them only if it made exactly the
    next one.
I5  A deleted file is `kept` iff the server was told, in a removal or in the acknowledgement of a break, that it is open
    here. Who opens a file counts it as open before he validates it, so that no break can come between.
I6  A vnode has a promise only if its volume is where we believe it to be (`volumes`).
I7  What keys may do with a vnode (`access`) is known under one promise and one ctime: whatever changes rights breaks
    the first or changes the second, also if it was done here.
I8  `by_ino` and `by_fid` hold the same vnodes; a vnode in use is never evicted.
"""

from __future__ import annotations

import errno
import logging
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from promisefs_protocol.ids import Fid, PromisedStatus, Status
from promisefs_protocol.messages import Break, Changed
from promisefs_protocol.observe.tracing import Event, tracing
from promisefs_protocol.rights import LOOKUP

from promisefs_client.data.contents import FileContents, PageCache
from promisefs_client.errors import FsError
from promisefs_client.fuse.kernel_size import KernelSize
from promisefs_client.identity.key import Credentials
from promisefs_client.network.servers import CallMark, Server

from .open_mmaps import OpenMmaps
from .vnode import ROOT_INO, Access, DirectoryNames, Version, Vnode, ino_of
from .volumes import Volume, Volumes

log = logging.getLogger(__name__)

PROMISE_MARGIN_S = 10.0
"""The last seconds of a promise are not used (AFS clients do the same)."""


MAX_KEYS_OF_VNODE = 16
"""Of further ones the server is asked again and again."""
MAX_ACCESSES = 10_000
"""Distinct `Access`es that vnodes share; then they begin anew."""

NO_INCARNATION = -1
"""Of a status that is not to be compared with any other."""


class KernelWork(NamedTuple):
    """Caches of the kernel that are no longer right for one inode."""

    ino: int
    pages: bool
    names: bool
    grown_to: int  # the new size if the file grew and may be mapped, else 0
    renew: bool = False  # open, so it may be mapped: it needs a promise again before the break is acknowledged
    twins: int = 0  # of `FileContents.keep_twins`, where the pages stay, until they have it


class VnodeTable:
    def __init__(self, cache: PageCache, volumes: Volumes, mounted: Volume, root: Status, max_idle: int) -> None:
        """`mounted` is the volume whose root directory, of status `root`, the kernel knows from the beginning."""
        self.cache = cache
        self.volumes = volumes
        """Every vnode is in one of these."""
        self.names_can_be_dropped = False
        """Whether the kernel can be made to forget names without its directory locks; else it may not keep any."""
        self.found_stale: list[KernelWork] = []
        """Kernel caches that a status showed to be stale without a break; the shell takes and empties it."""
        self._max_idle = max_idle
        self._by_fid: dict[Fid, Vnode] = {}
        self._by_ino: dict[int, Vnode] = {}
        self._idle: OrderedDict[Fid, None] = OrderedDict()
        self.open_mmaps = OpenMmaps()
        """Files that may be mapped. The shell says what the kernel opens, flushes and releases."""
        self._accesses: dict[Access, Access] = {}
        self.shared = False
        """Other users can use the mount. The kernel does not ask who looks at what it has been told."""
        self._creating = 0
        self._claimed: set[Fid] = set()
        self.root_fid = mounted.root
        root_vnode = self._resident(self._insert(mounted, mounted.root, root))
        root_vnode.lookups = 1  # the kernel's, never forgotten
        root_vnode.parent = mounted.root

    # Looking up

    def __len__(self) -> int:
        return len(self._by_fid)

    def __iter__(self) -> Iterator[Vnode]:
        return iter(list(self._by_fid.values()))

    def __contains__(self, fid: object) -> bool:
        return fid in self._by_fid

    def get(self, fid: Fid) -> Vnode | None:
        return self._by_fid.get(fid)

    def ino(self, fid: Fid) -> int:
        """The inode number of a fid, whether it is in the table or not."""
        return ROOT_INO if fid == self.root_fid else ino_of(fid)

    def by_ino(self, ino: int) -> Vnode | None:
        return self._by_ino.get(ino)

    def valid(self, vnode: Vnode, now: float) -> bool:
        """Whether cached knowledge of the vnode may be served without asking."""
        return vnode.promise_until > now and vnode.volume.server.lease_until > now

    def remaining_s(self, vnode: Vnode, now: float) -> float:
        """How long the kernel may keep what it is told of the vnode; 0 without a promise."""
        if self.shared and not vnode.rights_of_anyone & LOOKUP:
            return 0.0
        return max(0.0, vnode.promise_until - now) if vnode.volume.server.lease_until > now else 0.0

    def name_remaining_s(self, directory: Vnode, name: bytes, fid: Fid | None, now: float) -> float:
        """How long the kernel may believe that `name` stands for `fid` (None: for nothing)."""
        names = directory.names
        if not self.names_can_be_dropped or names is None or not names.knows(name) or names.entries.get(name) != fid:
            return 0.0
        return self.remaining_s(directory, now)

    # Calls and what they bring

    def install(self, entry: PromisedStatus, mark: CallMark) -> Vnode:
        """Apply a status and, if nothing came between (I1), its promise."""
        vnode = self._by_fid.get(entry.fid)
        if vnode is None:
            vnode = self._insert(self._volume_told(entry.fid, mark.server), entry.fid, entry.status)
            self._set_promise(vnode, entry, mark)
            return vnode
        if self._is_newer(vnode.status, entry.status):
            promised = self.valid(vnode, mark.sent_at)
            if not promised or entry.status.ctime_ns != vnode.status.ctime_ns:
                vnode.access = ()
            self._apply(vnode, entry.status, promised)
            self._set_promise(vnode, entry, mark)
        return vnode

    def _volume_told(self, fid: Fid, server: Server) -> Volume:
        """The volume of a fid that is new to us. Raise FsError(EIO) if the server that named it does not have that."""
        volume = self.volumes.get(fid.volume)
        if volume is None or volume.server is not server:
            log.error("%s told of %s, in a volume that is not known to be its own", server.name, fid)
            raise FsError(errno.EIO)
        return volume

    def install_own_data(self, entry: PromisedStatus, mark: CallMark) -> Vnode:
        """Like `install`, for the reply to our own store or truncation: it made one new version itself (I3)."""
        vnode = self._by_fid[entry.fid]
        contents = vnode.contents
        if contents is not None and contents.version is not None:
            promised = self.valid(vnode, mark.sent_at)
            if promised or entry.status.data_version == contents.version[1] + 1:
                self._advance(vnode, contents, entry.status)
        return self.install(entry, mark)

    def stores_done(self, vnode: Vnode) -> None:
        """No own store is in flight any more: a version still ahead of the label means that another's came between."""
        contents = vnode.contents
        if contents is not None and (vnode.own_versions or contents.version not in (None, vnode.status.version)):
            vnode.own_versions.clear()
            other = contents.set_version(vnode.status.version, vnode.status.size, keep_twins=vnode.kernel_pages)
            if other and vnode.kernel_pages:
                self.found_stale.append(KernelWork(vnode.ino, True, False, 0))

    def _advance(self, vnode: Vnode, contents: FileContents, status: Status) -> None:
        assert contents.version is not None
        incarnation, label = contents.version
        if status.incarnation != incarnation:
            return
        ahead = vnode.own_versions
        if status.data_version > label:
            ahead.add(status.data_version)
        while label + 1 in ahead:
            label += 1
            ahead.discard(label)
        if label != contents.version[1]:
            # The replies come in any order, so the size may be known better than from this one.
            size = status.size if self._is_newer(vnode.status, status) else vnode.status.size
            contents.advance_version((incarnation, label), size)

    @staticmethod
    def _is_newer(known: Status, new: Status) -> bool:
        return new.incarnation != known.incarnation or new.ctime_ns >= known.ctime_ns

    def _apply(self, vnode: Vnode, status: Status, promised: bool) -> None:
        """Take a newer status. `promised`: no break came since the last one, so no change can be another client's."""
        if tracing.on and status.version != vnode.status.version:
            _trace_version(Event.SET_DV, vnode, status.version, vnode.status.version)
        vnode.status = status
        if status.nlink == 0:
            vnode.deleted = True
        contents = vnode.contents
        # A version that our own stores in flight made, or whose replies are ahead, is settled in `stores_done`.
        had_label = contents is not None and contents.version is not None
        if contents is not None and not (had_label and promised and (vnode.own_versions or contents.is_storing)):
            vnode.own_versions.clear()
            label = contents.version
            other = contents.set_version(status.version, status.size, keep_twins=vnode.kernel_pages)
            if other and label is not None and tracing.on:
                _trace_version(Event.DV_MISMATCH, vnode, status.version, label)
            if other and had_label and vnode.kernel_pages:
                self.found_stale.append(KernelWork(vnode.ino, True, False, 0))
        if vnode.names is not None and vnode.names.version != status.version:
            if tracing.on:
                _trace_version(Event.DV_MISMATCH, vnode, status.version, vnode.names.version)
            vnode.names = None

    def _set_promise(self, vnode: Vnode, entry: PromisedStatus, mark: CallMark) -> None:
        volume = vnode.volume
        if not volume.located or not volume.server.still_promises(vnode.fid, mark):
            if tracing.on:
                reason = "overtaken by a break or reset" if volume.located else "its volume may have moved"
                tracing.emit(Event.CB_OVERTAKEN, fid=vnode.fid, server=volume.server.name, reason=reason)
            return
        until = mark.sent_at + entry.promise_s - PROMISE_MARGIN_S
        if entry.promise_s and until > vnode.promise_until:
            vnode.promise_until = until
            if tracing.on:
                tracing.emit(Event.CB_PROMISE, fid=vnode.fid, server=volume.server.name, seconds=entry.promise_s)
        if entry.promise_s and mark.credentials is not None:
            vnode.rights_of_anyone = entry.rights_of_anyone
            if vnode.rights_of(mark.credentials) != entry.rights:
                self._learn_rights(vnode, mark.credentials, entry.rights)

    def _learn_rights(self, vnode: Vnode, who: Credentials, rights: int) -> None:
        access = ((who, rights), *(pair for pair in vnode.access if pair[0] is not who))[:MAX_KEYS_OF_VNODE]
        if len(self._accesses) >= MAX_ACCESSES:
            self._accesses.clear()
        vnode.access = self._accesses.setdefault(access, access)

    def _insert(self, volume: Volume, fid: Fid, status: Status) -> Vnode:
        vnode = Vnode(fid, volume, self.ino(fid), status)
        vnode.deleted = status.nlink == 0
        self._by_fid[fid] = vnode
        self._by_ino[vnode.ino] = vnode
        self._idle[fid] = None
        self._trim_idle()
        return vnode

    # Breaks and resets

    def break_promises(self, server: Server, breaks: Sequence[Break]) -> tuple[list[KernelWork], list[Fid]]:
        """CB.CallBack. Return the kernel work to do before acknowledging, and which deleted files are open here."""
        server.broke(item.fid for item in breaks)
        work: list[KernelWork] = []
        still_open: list[Fid] = []
        for item in breaks:
            vnode = self._by_fid.get(item.fid)
            if tracing.on:
                _trace_break(server, item, known=vnode is not None)
            if vnode is None:
                if item.changed & Changed.DELETED and self._creating and self.volumes.get(item.fid.volume):
                    still_open.append(item.fid)  # it may be the file whose creation is under way
                    self._claimed.add(item.fid)
                continue
            if vnode.volume.server is not server:
                continue  # another server's word counts
            vnode.promise_until = 0.0
            if item.changed & Changed.DELETED:
                vnode.deleted = True
                if vnode.opens:
                    vnode.kept = True
                    still_open.append(vnode.fid)
            grown_to = 0
            pages = names = False
            if item.changed & Changed.DATA:
                names = vnode.status.is_dir
                vnode.names = None
                pages = vnode.kernel_pages
                grown_to = item.size if vnode.opens and item.size > vnode.size else 0
                if vnode.contents is not None:
                    vnode.own_versions.clear()
                    vnode.contents.drop_clean(keep_twins=pages and vnode.lookups > 0)
            if vnode.lookups:
                renew = vnode.kernel_pages and vnode.opens > 0
                stays = renew and not pages
                twins = vnode.contents.keep_twins() if stays and vnode.contents is not None else 0
                work.append(KernelWork(vnode.ino, pages, names, grown_to, renew, twins))
        return work, still_open

    def reset(self, server: Server) -> tuple[list[KernelWork], list[KernelWork]]:
        """InitCallBackState3 or a lost lease: no promise of the server's holds, nor what it said of its volumes. Return
        kernel work: what is open, first what may be mapped, and the rest.

        Clean blocks and names keep their labels: validation tells whether they are still current. But not if the
        server's store is an older one now: its labels and times compare with none from before.
        """
        server.broke_all()
        restored, server.restored = server.restored, False
        self.volumes.lose_all_of(server)
        return self._drop_promises({volume for volume in self.volumes if volume.server is server}, restored)

    def lose_location(self, volume: Volume) -> tuple[list[KernelWork], list[KernelWork]]:
        """The volume is not where it was: like a reset of this volume alone."""
        self.volumes.lose(volume)
        return self._drop_promises({volume}, restored=False)

    def _drop_promises(self, volumes: set[Volume], restored: bool) -> tuple[list[KernelWork], list[KernelWork]]:
        urgent = {vnode: None for vnode in self.open_mmaps.of_volumes(volumes)}  # in this order
        rest: list[KernelWork] = []
        for vnode in self._by_fid.values():
            if vnode.volume not in volumes:
                continue
            vnode.promise_until = 0.0
            if restored:
                self._distrust(vnode)
            if vnode.opens:
                urgent[vnode] = None
            elif vnode.lookups:
                rest.append(KernelWork(vnode.ino, restored and vnode.kernel_pages, vnode.status.is_dir, 0))
        return [self._drop_of_open(vnode) for vnode in urgent], rest

    @staticmethod
    def _distrust(vnode: Vnode) -> None:
        """Whatever status comes next is taken."""
        vnode.status = vnode.status._replace(incarnation=NO_INCARNATION)
        vnode.names = None
        vnode.target = None
        vnode.own_versions.clear()
        if vnode.contents is not None:
            vnode.contents.drop_clean(keep_twins=vnode.kernel_pages)

    @staticmethod
    def _drop_of_open(vnode: Vnode) -> KernelWork:
        if vnode.kernel_pages and vnode.contents is not None:
            vnode.contents.keep_twins()
        return KernelWork(vnode.ino, vnode.kernel_pages, vnode.status.is_dir, 0, vnode.kernel_pages)

    def begin_create(self) -> None:
        """A file is being created here, to be opened at once; `end_create` follows."""
        self._creating += 1

    def end_create(self, vnode: Vnode | None) -> list[Fid]:
        """It is there, or failed (None). Return what was claimed as open in CB.CallBack without need."""
        if vnode is not None and vnode.fid in self._claimed:
            self._claimed.discard(vnode.fid)
            vnode.deleted = vnode.kept = True
        self._creating -= 1
        if self._creating:
            return []
        needless = list(self._claimed)
        self._claimed.clear()
        return needless

    def vnode_is_gone(self, vnode: Vnode) -> None:
        """The server does not know the fid any more."""
        vnode.deleted = True
        vnode.promise_until = 0.0

    # Names

    def learn_name(self, directory: Vnode, version: Version, name: bytes, fid: Fid | None) -> None:
        """A lookup told what `name` is in that version of the directory."""
        if directory.status.version != version:
            return
        if directory.names is None:
            directory.names = DirectoryNames(version)
        directory.names.entries[name] = fid

    def learn_listing(self, directory: Vnode, version: Version, entries: dict[bytes, Fid | None]) -> None:
        """A whole listing, all of it of one version."""
        if directory.status.version == version:
            directory.names = DirectoryNames(version)
            directory.names.entries = entries
            directory.names.complete = True

    def own_change(self, entry: PromisedStatus, mark: CallMark, changes: dict[bytes, Fid | None]) -> Vnode:
        """Our own change of a directory: install its new status and edit the names if no other change came between."""
        directory = self._by_fid.get(entry.fid)
        names = None if directory is None else directory.names
        if names is not None and entry.status.version == (names.version[0], names.version[1] + 1):
            names.version = entry.status.version
            for name, fid in changes.items():
                if fid is None and names.complete:
                    names.entries.pop(name, None)
                else:
                    names.entries[name] = fid
        directory = self.install(entry, mark)
        if directory.names is None:
            for name, fid in changes.items():
                self.learn_name(directory, entry.status.version, name, fid)
        return directory

    # References

    def add_lookup(self, vnode: Vnode) -> Vnode:
        """The kernel is about to be told of it. Return the vnode that stands in the table."""
        vnode = self._resident(vnode)
        vnode.lookups += 1
        return vnode

    def _resident(self, vnode: Vnode) -> Vnode:
        """A vnode may have been evicted while a task that held it waited: then put it, or its successor, to use."""
        current = self._by_fid.setdefault(vnode.fid, vnode)
        self._by_ino[current.ino] = current
        self._idle.pop(current.fid, None)
        return current

    def forget(self, ino: int, count: int) -> bool:
        """The kernel dropped `count` references. Return whether it had so many; if not, it has none now."""
        vnode = self._by_ino.get(ino)
        if vnode is None or vnode.fid == self.root_fid:
            return True
        had = vnode.lookups
        vnode.lookups = max(had - count, 0)
        if vnode.lookups == 0:
            vnode.kernel_pages = False
            vnode.kernel_size = KernelSize()
            self.may_be_idle(vnode)
        return had >= count

    def add_open(self, vnode: Vnode) -> Vnode:
        """A handle is about to be given out. Return the vnode that stands in the table."""
        vnode = self._resident(vnode)
        vnode.opens += 1
        return vnode

    def drop_open(self, vnode: Vnode) -> None:
        assert vnode.opens > 0
        vnode.opens -= 1
        self.may_be_idle(vnode)

    def may_be_idle(self, vnode: Vnode) -> None:
        """Something that kept the vnode in use ended; idle vnodes are kept, least recently used going first (I8)."""
        if vnode.in_use or self._by_fid.get(vnode.fid) is not vnode:
            return
        if vnode.deleted:
            self._evict(vnode)
        else:
            self._idle[vnode.fid] = None
            self._idle.move_to_end(vnode.fid)
            self._trim_idle()

    def _trim_idle(self) -> None:
        while len(self._idle) > self._max_idle:
            fid, _ = self._idle.popitem(last=False)
            vnode = self._by_fid[fid]
            if vnode.in_use:
                continue
            if vnode.promise_until:
                vnode.volume.server.given_up.append(fid)
            self._evict(vnode)

    def _evict(self, vnode: Vnode) -> None:
        if vnode.contents is not None:
            vnode.contents.forget()
            vnode.contents = None
        vnode.promise_until = 0.0
        vnode.names = None
        self._idle.pop(vnode.fid, None)
        del self._by_fid[vnode.fid]
        del self._by_ino[vnode.ino]

    def check_invariants(self) -> None:
        assert len(self._by_fid) == len(self._by_ino)
        for vnode in self._by_fid.values():
            assert self._by_ino[vnode.ino] is vnode
            assert vnode.volume is self.volumes[vnode.fid.volume]
            assert vnode.volume.located or not vnode.promise_until, "I6"
            assert vnode.names is None or vnode.names.version == vnode.status.version
            assert not (vnode.fid in self._idle and vnode.lookups)


def _trace_version(event: Event, vnode: Vnode, now: Version, before: Version) -> None:
    reason = None if now[0] == before[0] else f"incarnation {before[0]} became {now[0]}"
    tracing.emit(event, fid=vnode.fid, dv=now[1], was=before[1], reason=reason)


def _trace_break(server: Server, item: Break, *, known: bool) -> None:
    """A data version of 0: not told by the server, but feared after a call that was not answered."""
    what = "|".join(flag.name.lower() for flag in Changed(item.changed) if flag.name)
    reason = None if item.data_version else "a call was not answered"
    about = {"changed": what, "dv": item.data_version or None, "known": known, "reason": reason}
    tracing.emit(Event.CB_BREAK, fid=item.fid, server=server.name, **about)
