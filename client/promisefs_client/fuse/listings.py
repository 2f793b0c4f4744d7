"""READDIRPLUS replies that the kernel may not have taken in yet. Core: no I/O, no clock.

The kernel stamps a dentry with an epoch. For LOOKUP and CREATE it is that from before the request (fuse_lookup,
fuse_create_open), so the name of a reply overtaken by INC_EPOCH is looked up again. For READDIRPLUS it is that of the
moment when the reply is parsed (fuse_direntplus_link): names of an overtaken reply would pass for new. So after such a
race the epoch has to go up once more, when the reply is known to be parsed: when its handle is read or closed next.
"""

from __future__ import annotations

from collections.abc import Callable


class ListingsInFlight:
    """Which open directories had a reply that is not known to be parsed. `bump` raises the kernel's epoch."""

    def __init__(self, bump: Callable[[], object]) -> None:
        self._bump = bump
        self._sent: dict[int, int] = {}  # handle -> inode of the directory
        self._overtaken: set[int] = set()

    def sent(self, handle: int, ino: int) -> None:
        """A reply with names of directory `ino` leaves."""
        self._sent[handle] = ino

    def parsed(self, handle: int) -> None:
        """The kernel came back with the handle, so it is done with the reply."""
        if self._sent.pop(handle, None) is not None and handle in self._overtaken:
            self._overtaken.discard(handle)
            self._bump()

    def overtake(self, inodes: set[int]) -> set[int]:
        """Names of these directories were just dropped. Return the handles whose replies may still bring some back.

        Each reply is returned once: one that stays unparsed (its process sleeps) does not hold up every change.
        """
        overtaken = {handle for handle, ino in self._sent.items() if ino in inodes} - self._overtaken
        self._overtaken |= overtaken
        return overtaken

    def pending(self, handles: set[int]) -> bool:
        """Whether one of these overtaken replies is still not known to be parsed."""
        return not handles.isdisjoint(self._overtaken)
