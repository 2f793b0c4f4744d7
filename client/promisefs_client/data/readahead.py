"""How far to fetch ahead of a reader: one per open file.

A reader is sequential as long as each read begins near the end of what was read so far. "Near" is a few reads' worth,
as the kernel has several reads of its own readahead in flight and they may come in any order. So small random reads are
not taken for a sequence, unless the place where they happen is small as well.
"""

from __future__ import annotations

from .pagecache import BLOCK_BYTES

FIRST_WINDOW_BYTES = 256 << 10
REORDER_BYTES = 1 << 20
"""How far from its place in a sequence a read may be."""
_REORDER_READS = 8
"""The same, in reads of the size at hand."""


class Readahead:
    """The window of one open file: bytes to have ready beyond the current read."""

    def __init__(self, max_bytes: int = 8 << 20) -> None:
        self._max_bytes = max_bytes
        self._window_bytes = 0
        self._frontier = 0  # end of the furthest read of the sequence
        self.begun_to = 0  # fetches for this sequence were begun, or found needless, up to here; its user sets it

    def want(self, offset: int, length: int) -> tuple[int, int]:
        """Note a read; return (start, end), in whole blocks, of what should be in the cache or on its way.

        It contains the read. The end may be past the end of the file, which is not known here.
        """
        end = offset + length
        if not self._is_near(offset, length):
            self._window_bytes = min(FIRST_WINDOW_BYTES, self._max_bytes) if offset == 0 else 0
            self._frontier = end
            self.begun_to = 0
        elif end > self._frontier:
            self._window_bytes = min(max(self._window_bytes * 2, FIRST_WINDOW_BYTES), self._max_bytes)
            self._frontier = end
        return offset // BLOCK_BYTES * BLOCK_BYTES, -(-(end + self._window_bytes) // BLOCK_BYTES) * BLOCK_BYTES

    def _is_near(self, offset: int, length: int) -> bool:
        return abs(offset - self._frontier) <= min(REORDER_BYTES, _REORDER_READS * length)
