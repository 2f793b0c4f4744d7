"""Clean blocks of all files: one list, least recently used first, and one byte limit.

A clean block is what the server said (or accepted) about one aligned piece of a file. Losing one costs a fetch, never
data, so clean blocks make room whenever clean and dirty bytes together pass the limit. Dirty bytes are only counted.

Invariants:
I1  A block is in the list iff it is in its file's dictionary.
I2  `clean_bytes` is the sum of the lengths of all blocks in the list.
I3  `CleanBlock.data` is immutable bytes of its own, never a view into something larger: a removed block's memory is
    free as soon as the last reply made from it is gone, and a reply never changes after it was handed out.
"""

from __future__ import annotations

from collections import OrderedDict

BLOCK_BYTES = 131072
"""Size of a clean block, and of one READ of the kernel."""


class CleanBlock:
    """Up to BLOCK_BYTES of server data; shorter only at the end of the file."""

    __slots__ = ("data", "home", "index")

    def __init__(self, home: dict[int, CleanBlock], index: int, data: bytes) -> None:
        self.home = home  # the file's dictionary that holds this block under `index`
        self.index = index  # position in the file, in blocks
        self.data = data


CLEAN_SHARE = 8
"""One part in so many of the limit is for clean blocks however much is dirty: a read that needs two blocks would else
fetch them in turn for ever, each driving the other out."""


class PageCache:
    """The memory that file contents of one mount take."""

    def __init__(self, limit_bytes: int) -> None:
        """`limit_bytes` bounds clean and dirty bytes together as far as clean bytes can make room."""
        self.limit_bytes = limit_bytes
        self.clean_bytes = 0
        self.dirty_bytes = 0
        """Dirty and storing bytes of all files; each file's contents add and subtract their own."""
        self._lru: OrderedDict[CleanBlock, None] = OrderedDict()

    def add(self, block: CleanBlock) -> None:
        """Take in a new block, as the most recently used. Does not evict: the caller does once it is done adding."""
        block.home[block.index] = block
        self._lru[block] = None
        self.clean_bytes += len(block.data)

    def touch(self, block: CleanBlock) -> None:
        """Make `block` the most recently used."""
        self._lru.move_to_end(block)

    def replace(self, block: CleanBlock, data: bytes) -> None:
        """Give `block` other bytes; replies made from the old ones keep those."""
        self.clean_bytes += len(data) - len(block.data)
        block.data = data

    def remove(self, block: CleanBlock) -> None:
        del self._lru[block]
        del block.home[block.index]
        self.clean_bytes -= len(block.data)

    def evict(self, keep: int = 0) -> None:
        """Drop least recently used blocks until the limit holds, but never the `keep` most recently used.

        Without `keep`, dirty bytes at the limit would evict what was just fetched before anybody could read it.
        """
        room = max(self.limit_bytes - self.dirty_bytes, self.limit_bytes // CLEAN_SHARE)
        while self.clean_bytes > room and len(self._lru) > keep:
            self.remove(next(iter(self._lru)))

    def check_invariants(self) -> None:
        """Assert I1, I2 and I3."""
        assert self.clean_bytes == sum(len(block.data) for block in self._lru), "I2"
        for block in self._lru:
            assert block.home.get(block.index) is block, "I1"
            assert type(block.data) is bytes and 0 < len(block.data) <= BLOCK_BYTES, "I3"
        assert self.dirty_bytes >= 0
