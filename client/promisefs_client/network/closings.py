"""Deleted files that were closed here: their server is to be told (GiveUpOpen), since it keeps them for us until then.

Core: no I/O. What is not told yet waits here however long the server is away. Bounded: beyond MAX_OWED old ones are
forgotten; the server then keeps those files until this mount ends.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

from promisefs_protocol.ids import Fid

MAX_OWED = 100_000


class Closings:
    """What is owed, by volume, in the order of closing."""

    def __init__(self) -> None:
        self._owed: dict[int, dict[Fid, None]] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, fids: Iterable[Fid]) -> int:
        """Note that these were closed. Return how many others had to be forgotten for them."""
        forgotten = 0
        for fid in fids:
            of_volume = self._owed.setdefault(fid.volume, {})
            if fid in of_volume:
                continue
            of_volume[fid] = None
            self._count += 1
            if self._count > MAX_OWED:
                oldest = next(iter(next(iter(self._owed.values()))))
                self.told([oldest])
                forgotten += 1
        return forgotten

    def owed(self, volume: int, most: int) -> tuple[Fid, ...]:
        """Some that the server of this volume is to be told."""
        return tuple(islice(self._owed.get(volume, ()), most))

    def told(self, fids: Iterable[Fid]) -> None:
        for fid in fids:
            of_volume = self._owed.get(fid.volume, {})
            if fid in of_volume:
                del of_volume[fid]
                self._count -= 1
                if not of_volume:
                    del self._owed[fid.volume]
