"""Under whose key the dirty bytes of each page were written. A page has one key: who writes to one that holds another
key's dirty bytes has those stored first.

Almost always a file is written under a single key, so only the pages of other keys are listed.
"""

from __future__ import annotations

from promisefs_client.identity.key import Key

from .whole_pages import PAGE_BYTES


class PageKeys:
    """Of one file. What it says of pages that are not dirty means nothing."""

    __slots__ = ("_others", "_usual")

    def __init__(self) -> None:
        self._usual: Key | None = None
        self._others: dict[int, Key | None] = {}

    def set(self, start: int, end: int, key: Key | None, *, alone: bool) -> None:
        """These bytes are written now. `alone`: nothing else is dirty."""
        if alone:
            self._others.clear()
            self._usual = key
        elif key != self._usual:
            for page in _pages(start, end):
                self._others[page] = key
        elif self._others:
            for page in _pages(start, end):
                self._others.pop(page, None)

    def of(self, offset: int) -> Key | None:
        return self._others.get(offset // PAGE_BYTES, self._usual) if self._others else self._usual

    def run_end(self, start: int, limit: int) -> int:
        """How far from `start` on, at most to `limit`, the key is the same."""
        if self._others:
            key = self.of(start)
            for page in _pages(start, limit):
                if self._others.get(page, self._usual) != key:
                    return page * PAGE_BYTES
        return limit

    def may_be_other(self, key: Key | None) -> bool:
        """Whether any page may have another key."""
        return bool(self._others) or key != self._usual


def _pages(start: int, end: int) -> range:
    return range(start // PAGE_BYTES, (end - 1) // PAGE_BYTES + 1) if end > start else range(0)
