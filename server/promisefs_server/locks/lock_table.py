"""The lock table: which owners hold which ranges of which files, and who waits for what. No I/O, no clock.

Locks of flock(2) and those of fcntl(2) do not see each other, so each file has two *books*. In a book every owner has
pieces (`promisefs_protocol.locks`), and those who wait stand in the order in which they came.

Invariants
L1  No two owners' pieces in one book conflict.
L2  Whoever waits, unless the table is paused, has somebody's lock in his way, or stands behind somebody who waits in
    his way (L3). So nobody is forgotten: whatever takes a lock away looks through the queue (`_wake`).
L3  Fairness: who holds nothing at all does not overtake anybody who waits for what he would be in the way of, so
    readers do not starve a writer. Who holds something overtakes: somebody may be waiting for him, so waiting for a
    place in a queue could make a circle in which no lock is in anybody's way. Who does not want to wait gets what is
    free, as with Linux.
L4  Nobody of fcntl(2) is put into a queue who would thereby wait for himself, through whatever files and hosts
    (DEADLK). Nothing is looked for among flocks: their owner has one file only. (FUSE does not tell locks of open file
    descriptions from those of processes, so these are looked at too.)
L5  `_pieces` and `_waiting` count and name what the books have, by owner and by host.

What came of those who waited is collected in `answers`, for the shell to send.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

from promisefs_protocol.abort import AbortCode, Aborted
from promisefs_protocol.locks import WHOLE_FILE, Lock, LockKind, cover, replaced, within
from promisefs_protocol.messages import LockAnswer

MAX_PIECES_OF_HOST = 16_384
MAX_WAITING_OF_HOST = 1024
MAX_PIECES = 1_000_000
"""Beyond one of these: NOLCK."""
MAX_SEARCH = 10_000
"""Owners looked at for one circle. Beyond it there is taken to be none, as Linux does after ten."""


class Owner(NamedTuple):
    host: int
    flock: bool
    number: int


@dataclass(slots=True, eq=False)
class Waiter:
    key: int
    owner: Owner
    lock: Lock
    request: int
    wait: bool
    """False: it is to be answered when the table is not paused any more."""


@dataclass(slots=True, eq=False)
class _Book:
    held: dict[Owner, list[Lock]] = field(default_factory=dict)
    waiting: list[Waiter] = field(default_factory=list)


_EMPTY = _Book()
_BookKey = tuple[int, bool]
_Counted = TypeVar("_Counted")


class LockTable:
    def __init__(self) -> None:
        self.paused = False
        """While set nothing is given to anybody, but restored: everybody waits."""
        self.answers: list[tuple[int, LockAnswer]] = []
        """(host, answer), in order. Whoever sends them empties it."""
        self._books: dict[_BookKey, _Book] = {}
        self._pieces: dict[Owner, int] = {}
        self._pieces_of_host: dict[int, int] = {}
        self._pieces_in_all = 0
        self._waiting: dict[tuple[int, int], Waiter] = {}
        """(host, request) -> waiter."""
        self._waiting_of_owner: dict[Owner, list[Waiter]] = {}
        self._waiting_of_host: dict[int, int] = {}
        self._order = 0

    def concerns(self, host: int) -> bool:
        """Whether the host holds a lock or waits for one."""
        return host in self._pieces_of_host or host in self._waiting_of_host

    def holds(self, host: int) -> bool:
        return host in self._pieces_of_host

    @property
    def held(self) -> int:
        """Pieces of files that somebody has a lock on."""
        return self._pieces_in_all

    @property
    def waiting(self) -> int:
        """Requests that wait for their turn."""
        return len(self._waiting)

    def files(self) -> set[int]:
        """Those that somebody has a lock on or waits for."""
        return {key for key, _ in self._books}

    # What hosts ask for

    def set(self, key: int, owner: Owner, lock: Lock, request: int, *, wait: bool) -> tuple[int, bool]:
        """Return the order of the change, and whether the lock is granted; else it waits.

        Abort AGAIN, DEADLK, NOLCK.
        """
        if (owner.host, request) in self._waiting:
            return self._order, False
        self._check_room(owner)
        if owner.flock and any(piece.kind != lock.kind for piece in self._held(key, owner)):
            # A conversion is no single step, flock(2): else two readers that both want to write wait for ever.
            self._put(key, owner, *WHOLE_FILE, None)
            self._wake([(key, True)])
        if self.paused:
            return self._enqueue(Waiter(key, owner, lock, request, wait)), False
        if self._is_free(key, owner, lock) and not (wait and self._must_queue(key, owner, lock)):
            order = self._put(key, owner, lock.start, lock.end, lock)
            self._wake([(key, owner.flock), *self._queues_of(owner)])  # it may have been a write lock before
            return order, True
        if not wait:
            raise Aborted(AbortCode.AGAIN, "another's lock is in the way")
        if not owner.flock and self._waits_for(key, owner, lock):
            raise Aborted(AbortCode.DEADLK, "the owner of a lock in the way waits for one of this owner's")
        return self._enqueue(Waiter(key, owner, lock, request, True)), False

    def cancel(self, key: int, owner: Owner, lock: Lock, request: int) -> tuple[int, bool]:
        """Who waits does not wait any more. Return the order, and whether the owner has the lock all the same."""
        waiter = self._waiting.get((owner.host, request))
        if waiter is not None:
            self._dequeue(waiter)
            self._wake([(waiter.key, waiter.owner.flock)])
            return self._order, False
        return self._order, self.covers(key, owner, lock)

    def release(self, key: int, owner: Owner, start: int, end: int) -> int:
        """Return the order of the change. Abort NOLCK if what is left would be too many pieces."""
        held = self._held(key, owner)
        if any(piece.start < start and end < piece.end for piece in held):
            self._check_room(owner)
        order = self._put(key, owner, start, end, None)
        self._wake([(key, owner.flock)])
        return order

    def conflicting(self, key: int, owner: Owner, lock: Lock) -> tuple[Owner, Lock] | None:
        """The first piece that is in the way of this lock."""
        found = [(piece.start, holder, piece) for holder, piece in self._in_the_way(key, owner, lock)]
        return min(found)[1:] if found else None

    def covers(self, key: int, owner: Owner, lock: Lock) -> bool:
        """Whether the owner holds all of this, or better."""
        return cover(self._held(key, owner), lock)

    def restore(self, key: int, owner: Owner, lock: Lock) -> bool:
        """Give a lock back that the owner had at an earlier run of the server. Return whether nothing is in the way."""
        if not self._is_free(key, owner, lock) or not self._has_room(owner):
            return False
        self._put(key, owner, lock.start, lock.end, lock)
        return True

    # What happens to hosts and files

    def drop_host(self, host: int) -> None:
        """The host holds nothing any more and waits for nothing."""
        books = [k for k, book in self._books.items() if any(owner.host == host for owner in book.held)]
        for waiter in [waiter for (number, _), waiter in self._waiting.items() if number == host]:
            self._dequeue(waiter)
            books.append((waiter.key, waiter.owner.flock))
        for key, flock in dict.fromkeys(books):
            for owner in [owner for owner in self._book(key, flock).held if owner.host == host]:
                self._put(key, owner, *WHOLE_FILE, None)
        self._wake(dict.fromkeys(books))

    def drop_files(self, keys: Iterable[int], code: AbortCode) -> None:
        """These files are not here any more; who waits for one is told so."""
        for key, flock in [(key, flock) for key in keys for flock in (False, True)]:
            book = self._book(key, flock)
            for waiter in list(book.waiting):
                self._dequeue(waiter)
                self._answer(waiter, code)
            for owner in list(book.held):
                self._put(key, owner, *WHOLE_FILE, None)

    def resume(self) -> None:
        """Not paused any longer: everybody gets what he can get."""
        self.paused = False
        self._wake(list(self._books))
        for waiter in list(self._waiting.values()):
            if self._waiting.get((waiter.owner.host, waiter.request)) is not waiter:
                continue  # a refusal before it was to its good
            if not waiter.wait:
                self._refuse(waiter, AbortCode.AGAIN)
            elif not waiter.owner.flock and self._waits_for(waiter.key, waiter.owner, waiter.lock):
                self._refuse(waiter, AbortCode.DEADLK)

    def _refuse(self, waiter: Waiter, code: AbortCode) -> None:
        self._dequeue(waiter)
        self._answer(waiter, code)
        self._wake([(waiter.key, waiter.owner.flock)])

    # Who can have what

    def _book(self, key: int, flock: bool) -> _Book:
        """The book of a file, for reading."""
        return self._books.get((key, flock), _EMPTY)

    def _held(self, key: int, owner: Owner) -> list[Lock]:
        return self._book(key, owner.flock).held.get(owner, [])

    def _in_the_way(self, key: int, owner: Owner, lock: Lock) -> Iterator[tuple[Owner, Lock]]:
        for holder, pieces in self._book(key, owner.flock).held.items():
            if holder != owner:
                yield from ((holder, piece) for piece in pieces if piece.conflicts(lock))

    def _is_free(self, key: int, owner: Owner, lock: Lock) -> bool:
        return next(self._in_the_way(key, owner, lock), None) is None

    def _must_queue(self, key: int, owner: Owner, lock: Lock) -> bool:
        """Whether who comes now has to stand behind somebody (L3)."""
        waiting = self._book(key, owner.flock).waiting
        return owner not in self._pieces and any(waiter.lock.conflicts(lock) for waiter in waiting)

    def _waits_for(self, key: int, owner: Owner, lock: Lock) -> bool:
        """Whether somebody whose lock is in the way waits, maybe through others, for the owner (L4)."""
        seen = {holder for holder, _ in self._in_the_way(key, owner, lock)}
        todo = list(seen)
        while todo and len(seen) < MAX_SEARCH:
            for waiter in self._waiting_of_owner.get(todo.pop(), ()):
                for holder, _ in self._in_the_way(waiter.key, waiter.owner, waiter.lock):
                    if holder == owner:
                        return True
                    if holder not in seen:
                        seen.add(holder)
                        todo.append(holder)
        return False

    def _queues_of(self, owner: Owner) -> list[_BookKey]:
        """Where he waits: now that he holds something he may overtake there (L3)."""
        return [(waiter.key, waiter.owner.flock) for waiter in self._waiting_of_owner.get(owner, ())]

    def _wake(self, books: Iterable[_BookKey]) -> None:
        """Give those who wait in these books what is free by now, and what becomes so, or possible, by that."""
        todo = list(books)
        while todo and not self.paused:
            waiter = self._next(self._book(*todo[-1]))
            if waiter is None:
                todo.pop()
                continue
            self._dequeue(waiter)
            self._put(waiter.key, waiter.owner, waiter.lock.start, waiter.lock.end, waiter.lock)
            self._answer(waiter, 0)
            todo += self._queues_of(waiter.owner)

    def _next(self, book: _Book) -> Waiter | None:
        """The first in the queue who can have what he waits for."""
        ahead: list[Lock] = []
        for waiter in book.waiting:
            fair = waiter.wait and waiter.owner not in self._pieces
            queued = fair and any(waiter.lock.conflicts(lock) for lock in ahead)
            if not queued and self._is_free(waiter.key, waiter.owner, waiter.lock):
                return waiter
            ahead = _with(ahead, waiter.lock)
        return None

    # Changes

    def _put(self, key: int, owner: Owner, start: int, end: int, new: Lock | None) -> int:
        """All that the owner has of a range is `new`. Return the order of the change."""
        book = self._books.setdefault((key, owner.flock), _Book())
        before = book.held.get(owner, [])
        after = replaced(before, start, end, new)
        if after:
            book.held[owner] = after
        else:
            book.held.pop(owner, None)
        more = len(after) - len(before)
        _count(self._pieces, owner, more)
        _count(self._pieces_of_host, owner.host, more)
        self._pieces_in_all += more
        self._order += 1
        self._drop_if_empty((key, owner.flock))
        return self._order

    def _enqueue(self, waiter: Waiter) -> int:
        host = waiter.owner.host
        if self._waiting_of_host.get(host, 0) >= MAX_WAITING_OF_HOST:
            raise Aborted(AbortCode.NOLCK, f"{MAX_WAITING_OF_HOST} lock requests of this client wait already")
        self._books.setdefault((waiter.key, waiter.owner.flock), _Book()).waiting.append(waiter)
        self._waiting[host, waiter.request] = waiter
        self._waiting_of_owner.setdefault(waiter.owner, []).append(waiter)
        _count(self._waiting_of_host, host, 1)
        return self._order

    def _dequeue(self, waiter: Waiter) -> None:
        host = waiter.owner.host
        self._books[waiter.key, waiter.owner.flock].waiting.remove(waiter)
        self._drop_if_empty((waiter.key, waiter.owner.flock))
        del self._waiting[host, waiter.request]
        of_owner = self._waiting_of_owner[waiter.owner]
        of_owner.remove(waiter)
        if not of_owner:
            del self._waiting_of_owner[waiter.owner]
        _count(self._waiting_of_host, host, -1)

    def _answer(self, waiter: Waiter, code: int) -> None:
        self.answers.append((waiter.owner.host, LockAnswer(waiter.request, self._order, code)))

    def _drop_if_empty(self, book_key: _BookKey) -> None:
        book = self._books.get(book_key)
        if book is not None and not book.held and not book.waiting:
            del self._books[book_key]

    # Bounds

    def _has_room(self, owner: Owner) -> bool:
        return self._pieces_of_host.get(owner.host, 0) < MAX_PIECES_OF_HOST and self._pieces_in_all < MAX_PIECES

    def _check_room(self, owner: Owner) -> None:
        """Abort NOLCK unless there may be one piece more. A change makes two more at most."""
        if not self._has_room(owner):
            raise Aborted(AbortCode.NOLCK, "too many locks are held")

    def check_invariants(self) -> None:
        pieces: dict[Owner, int] = {}
        for (key, flock), book in self._books.items():
            assert book.held or book.waiting, "an empty book"
            for owner, held in book.held.items():
                assert owner.flock is flock and held and held == replaced(held, 0, -1, None)
                pieces[owner] = pieces.get(owner, 0) + len(held)
                for piece in held:
                    assert self._is_free(key, owner, piece), "L1"
            assert self.paused or self._next(book) is None, "L2"
            for waiter in book.waiting:
                assert (waiter.key, waiter.owner.flock) == (key, flock), "L5"
                assert self._waiting[waiter.owner.host, waiter.request] is waiter, "L5"
                assert waiter in self._waiting_of_owner[waiter.owner], "L5"
        queued = sum(len(book.waiting) for book in self._books.values())
        assert pieces == self._pieces and sum(pieces.values()) == self._pieces_in_all, "L5"
        assert sum(self._pieces_of_host.values()) == self._pieces_in_all and all(self._pieces_of_host.values()), "L5"
        assert queued == len(self._waiting) == sum(self._waiting_of_host.values()), "L5"


def _count(counts: dict[_Counted, int], of: _Counted, more: int) -> None:
    count = counts.get(of, 0) + more
    if count:
        counts[of] = count
    else:
        counts.pop(of, None)


def _with(ahead: list[Lock], lock: Lock) -> list[Lock]:
    """What those ahead are in the way of, with one more."""
    if cover(ahead, lock):
        return ahead
    writes = [piece for piece in within(ahead, lock.start, lock.end) if piece.kind == LockKind.WRITE]
    ahead = replaced(ahead, lock.start, lock.end, lock)
    for piece in writes:
        ahead = replaced(ahead, piece.start, piece.end, piece)
    return ahead
