"""What one owner of this mount holds of one file, as its server has said. Core: no I/O, no clock.

A process may wait for a lock in one thread while another releases one, and answers come on two connections. The server
gives each change an order; here changes are kept with it until no call is under way, so they take effect in that order
whatever the order of their answers.
"""

from __future__ import annotations

from promisefs_protocol.locks import Lock, LockKind, replaced, within


class HeldLocks:
    __slots__ = ("_changes", "_settled", "lost")

    def __init__(self) -> None:
        self._settled: list[Lock] = []
        self._changes: list[tuple[int, int, int, Lock | None]] = []
        self.lost: list[Lock] = []
        """What the owner still believes to hold, though the server does not say so any more."""

    @property
    def pieces(self) -> list[Lock]:
        pieces = self._settled
        for _, start, end, new in self._changes:
            pieces = replaced(pieces, start, end, new)
        return pieces

    def granted(self, order: int, lock: Lock) -> None:
        self._change(order, lock.start, lock.end, lock)

    def released(self, order: int, start: int, end: int) -> None:
        self._change(order, start, end, None)

    def _change(self, order: int, start: int, end: int, new: Lock | None) -> None:
        self._changes.append((order, start, end, new))
        self._changes.sort(key=lambda change: change[0])

    def settle(self) -> None:
        """No answer is outstanding: what comes from now on is later than all that came."""
        self._settled, self._changes = self.pieces, []

    def clear(self) -> None:
        """It holds nothing, and does not believe to."""
        self._settled, self._changes, self.lost = [], [], []

    def lose(self) -> None:
        self.lost = self.pieces
        self._settled, self._changes = [], []

    def give_up_lost(self, start: int, end: int) -> None:
        """The owner has released this range."""
        self.lost = replaced(self.lost, start, end, None)

    def writes_within(self, start: int, end: int) -> bool:
        """Whether something may have been written under a lock on this range."""
        return any(piece.kind == LockKind.WRITE for piece in within(self.pieces, start, end))

    def differences(self, lock: Lock) -> list[tuple[int, int, Lock | None]]:
        """(start, end, what is held) wherever that is less than `lock`: what to go back to from it."""
        parts: list[tuple[int, int, Lock | None]] = []
        position = lock.start
        for piece in within(self.pieces, lock.start, lock.end):
            if piece.start > position:
                parts.append((position, piece.start - 1, None))
            if piece.kind < lock.kind:
                parts.append((piece.start, piece.end, piece))
            position = piece.end + 1
        if position <= lock.end:
            parts.append((position, lock.end, None))
        return parts
