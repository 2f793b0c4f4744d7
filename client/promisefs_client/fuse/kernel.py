"""Has the kernel drop what it caches: in which order, how much at a time, and until it is certain.

Names are dropped with FUSE_NOTIFY_INC_EPOCH (Linux 6.16): every dentry, positive or negative, is looked up again when
next used. It takes no lock. Where the kernel does not know it, names are given to the kernel without any time
(`VnodeTable.names_can_be_dropped`), since invalidate_entry would wait for directory locks that our own requests hold.

How the kernel is told is the `Notifier`'s affair, see `notifications`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

import trio

from promisefs_client.vnodes.vnode_table import KernelWork

from .listings import ListingsInFlight

log = logging.getLogger(__name__)

BATCH = 512
"""Inodes of which only attributes are dropped, in one go."""
FILES_AT_A_TIME = 16
"""Files whose pages are dropped."""

LISTING_WAIT_S = 0.02
LISTING_POLL_S = 0.001
"""How long dropping names waits for a READDIRPLUS reply that it overtook: the kernel parses it at once, if it gets to
run. One that takes longer is made up for when it is known to be parsed."""

LOOKUP_FIRST_WAIT_S = 0.0005
LOOKUP_LONGEST_WAIT_S = 0.05
LOOKUP_TRIES = 100
"""An inode that the kernel was told of but does not know yet: the process that asked has the LOOKUP's reply and has not
got to run. On a busy machine that can take long, and what it is about to believe is stale: some five seconds."""


class Notifier(Protocol):
    """What a kernel can be told of its caches of one mount."""

    def increment_epoch(self) -> bool:
        """Have every dentry looked up again. Return whether this kernel can do that."""

    async def invalidate(self, items: Sequence[KernelWork]) -> list[KernelWork]:
        """Drop attributes and, where it says so, pages. Return the work of inodes that it does not know.

        May take as long as a READ of the file does.
        """

    async def store(self, ino: int, offset: int, data: bytes) -> None:
        """Put bytes into the page cache, as far as the file's size, which it raises."""

    async def ask(self, ino: int, generation: int) -> int | None:
        """Have the kernel ask for an inode's attributes. Return the size that it believes in then.

        None if that cannot be done, or the kernel does not know the inode.
        """


class KernelCaches:
    """The kernel's side of one mount. `references(ino)` says how many lookups of an inode the kernel was given."""

    def __init__(self, notifier: Notifier, references: Callable[[int], int]) -> None:
        self._notifier = notifier
        self._references = references
        self.has_epochs = False
        self._storing: dict[int, trio.Event] = {}
        """Inodes that a byte is being put into; what drops their pages waits."""
        self.listings = ListingsInFlight(notifier.increment_epoch)

    def initialised(self) -> None:
        """The kernel has answered INIT: learn what it can do."""
        self.has_epochs = self._notifier.increment_epoch()

    async def drop(self, work: Iterable[KernelWork]) -> None:
        """Return when the kernel no longer uses what `work` names. May take as long as a READ of the file does."""
        simple: list[KernelWork] = []
        with_pages: list[KernelWork] = []
        directories: set[int] = set()
        for item in work:
            if item.names:
                directories.add(item.ino)
            (with_pages if item.pages else simple).append(item)
        if directories and self.has_epochs:
            await self._drop_names_by_epoch(directories)
        if len(with_pages) + bool(simple) <= 1:
            await self._invalidate(simple or with_pages)
            return
        in_order = iter(with_pages)
        async with trio.open_nursery() as nursery:
            for start in range(0, len(simple), BATCH):
                nursery.start_soon(self._invalidate, simple[start : start + BATCH])
            for _ in range(min(len(with_pages), FILES_AT_A_TIME)):
                nursery.start_soon(self._invalidate_pages, in_order)

    async def _invalidate_pages(self, in_order: Iterator[KernelWork]) -> None:
        for item in in_order:
            await self._invalidate([item])

    async def _drop_names_by_epoch(self, directories: set[int]) -> None:
        self._notifier.increment_epoch()
        overtaken = self.listings.overtake(directories)
        if overtaken:
            with trio.move_on_after(LISTING_WAIT_S):
                while self.listings.pending(overtaken):  # noqa: ASYNC110 (rare and short)
                    await trio.sleep(LISTING_POLL_S)
            self._notifier.increment_epoch()

    def drop_every_name(self) -> None:
        """Have every dentry of the mount looked up again. Only where `has_epochs`."""
        self._notifier.increment_epoch()

    async def byte_taken(self, ino: int) -> None:
        """Return when the kernel has taken in what it is being given by `store_byte`."""
        while (event := self._storing.get(ino)) is not None:
            await event.wait()

    async def store_byte(self, ino: int, offset: int, byte: bytes) -> None:
        """Put one byte into the kernel's page cache: makes it believe that the file reaches so far.

        Without it a mapping that was there before the file grew still gets SIGBUS behind the old end.
        """
        await self.byte_taken(ino)
        done = self._storing[ino] = trio.Event()
        try:
            await self._notifier.store(ino, offset, byte)
        finally:
            del self._storing[ino]
            done.set()

    async def ask(self, ino: int, generation: int) -> int | None:
        """See `Notifier.ask`."""
        return await self._notifier.ask(ino, generation)

    async def _invalidate(self, items: Sequence[KernelWork]) -> None:
        """Invalidate inodes; those that the kernel has yet to learn of, as soon as it has."""
        wait_s = LOOKUP_FIRST_WAIT_S
        for _ in range(LOOKUP_TRIES):
            if not items:
                return
            for item in items:
                while item.pages and (event := self._storing.get(item.ino)) is not None:
                    await event.wait()
            unknown = await self._notifier.invalidate(items)
            items = [item for item in unknown if self._references(item.ino)]
            if items:
                await trio.sleep(wait_s)
                wait_s = min(2 * wait_s, LOOKUP_LONGEST_WAIT_S)
        inodes = [item.ino for item in items]
        log.warning("inodes %s: the kernel was told of them %d tries ago and does not know them", inodes, LOOKUP_TRIES)
