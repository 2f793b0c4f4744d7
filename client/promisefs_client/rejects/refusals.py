"""Which writes of one file the server has refused, and which open files have been told. Core: no I/O.

As Linux counts errors of writeback (errseq_t): each open file is told once of what came after it was opened, by the
first of its calls that can say so. It is told of what was refused under its own key.

What is *final* is refused: asking again would not help, or nobody knows when it will, and the application has to
know. Anything else, above all a server that does not answer, leaves the bytes dirty to be stored later.
"""

from __future__ import annotations

from promisefs_protocol.abort import AbortCode, Aborted

from promisefs_client.identity.key import Key

_PASSES = frozenset(
    {
        AbortCode.AGAIN,
        AbortCode.CHANGED,
        AbortCode.VNOVOL,  # the volume may come back
        AbortCode.VMOVED,
        AbortCode.VOFFLINE,
        AbortCode.BAD_VERSION,
        AbortCode.NOT_INTRODUCED,
        AbortCode.NO_CALLBACKS,
        AbortCode.SHUTTING_DOWN,
        AbortCode.TOO_MANY,
    }
)


def is_final(refusal: Aborted) -> bool:
    """Whether the server would refuse the same store again."""
    return refusal.code not in _PASSES


class Writer:
    """An open file that may be written through, or mapped for it."""

    __slots__ = ("key", "told")

    def __init__(self, key: Key, told: int) -> None:
        self.key = key
        self.told = told  # it knows of so many of the file's refusals


class Refusals:
    """Those of one file since it was opened."""

    __slots__ = ("_last", "count")

    def __init__(self) -> None:
        self.count = 0
        self._last: dict[Key | None, tuple[int, int, str]] = {}  # number of the last one, its abort code and text

    def note(self, key: Key | None, refusal: Aborted) -> None:
        self.count += 1
        self._last[key] = self.count, refusal.code, refusal.message

    def tell(self, writer: Writer) -> Aborted | None:
        """What the writer has not been told yet. From now on he has."""
        number, code, message = self._last.get(writer.key, (0, 0, ""))
        if number <= writer.told:
            return None
        writer.told = self.count
        return Aborted(code, message)

    def after(self, count: int) -> Aborted | None:
        """The last one after so many, whoever's it was."""
        number, code, message = max(self._last.values(), default=(0, 0, ""))
        return Aborted(code, message) if number > count else None
