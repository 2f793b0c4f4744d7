"""What the file store needs beside the contents of a file that is open or dirty."""

from __future__ import annotations

import trio
from promisefs_protocol.abort import AbortCode, Aborted

from promisefs_client.rejects.keeper import Event
from promisefs_client.rejects.refusals import Refusals
from promisefs_client.vnodes.vnode import Vnode


class FileState:
    __slots__ = (
        "appends",
        "appends_seen",
        "background",
        "changing",
        "dirty_since",
        "event",
        "expired_since",
        "failure",
        "fetching",
        "refusals",
        "retry_at",
        "shown",
        "store_lock",
        "through",
        "to_show",
        "unsaid",
        "vnode",
    )

    def __init__(self, vnode: Vnode) -> None:
        self.vnode = vnode
        self.store_lock = trio.Lock()
        self.fetching: dict[int, trio.Event] = {}  # block index -> set when its fetch ended, well or not
        self.dirty_since: float | None = None  # present iff dirty
        self.retry_at = 0.0  # not stored in the background before this, after a failure
        self.failure: Exception | None = None  # why the last store failed
        self.background = False  # a write-behind task runs
        self.appends = 0  # made since this state is kept
        self.appends_seen = 0  # so many of them everyone has acknowledged
        self.changing: set[trio.CancelScope] = set()  # calls under way that change the bytes at the server
        self.unsaid = False  # bytes were thrown away with a lock, and no fsync or close has said so yet
        self.refusals = Refusals()
        self.event: Event | None = None  # present while refused bytes leave
        self.through: list[tuple[int, int]] = []  # ranges whose writes wait until they are stored
        self.expired_since: float | None = None  # a token was found to have expired, and nothing was stored since
        self.to_show = False  # the kernel may have pages with refused bytes, and nothing has been done about it yet
        self.shown: trio.Event | None = None  # set when the kernel has dropped what was refused last


class LockLost(Aborted):
    """What was to be stored was written under a lock that is lost."""

    def __init__(self) -> None:
        super().__init__(AbortCode.IO, "the lock under which it was written is lost")
