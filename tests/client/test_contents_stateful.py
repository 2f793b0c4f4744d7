"""Random histories of one file's contents against a model that knows every byte.

The server is a bytearray with a version. This client's stores are sent, applied, answered or lost in separate steps;
another client's change has a window in which the bytes are new and the version is still the old one, and ends with a
break. Sizes of blocks and cells are shrunk so that every boundary is met often.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from unittest import mock

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from promisefs_client.data import clean, contents, dirty, pagecache, written
from promisefs_client.data.contents import FileContents, PageCache, StoreExtent

PAGE = 4
BLOCK = 16
CELL = 64
MAX_SIZE = 300

offsets = st.integers(0, MAX_SIZE)
lengths = st.integers(1, 100)


@dataclass
class Store:
    extent: StoreExtent
    before: int | None = None  # version at the server when it was applied; None: not yet
    size_after: int = 0


@dataclass
class Fetch:
    epoch: int
    index: int
    blocks: int
    version: int  # sampled before the bytes are read
    size: int
    data: bytes | None = None


@dataclass
class Server:
    data: bytearray = field(default_factory=bytearray)
    version: int = 1
    told_size: int = 0

    def put(self, offset: int, data: bytes | bytearray) -> None:
        if offset > len(self.data):
            self.data.extend(bytes(offset - len(self.data)))
        self.data[offset : offset + len(data)] = data

    def commit(self) -> None:
        self.version += 1
        self.told_size = len(self.data)


class Contents(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.patches = [
            mock.patch.object(contents, "BLOCK_BYTES", BLOCK),
            mock.patch.object(pagecache, "BLOCK_BYTES", BLOCK),
            mock.patch.object(clean, "BLOCK_BYTES", BLOCK),
            mock.patch.object(clean, "PAGE_BYTES", PAGE),
            mock.patch.object(contents, "STORE_BYTES", CELL),
            mock.patch.object(dirty, "STORE_BYTES", CELL),
            mock.patch.object(written, "STORE_BYTES", CELL),
            mock.patch.object(dirty, "_KEEP_BYTES", 8),
        ]
        for patch in self.patches:
            patch.start()
        self.server = Server()
        self.before_foreign: bytes | None = None  # present while another client's change is not finished
        self.dirty: dict[int, int] = {}
        self.stores: list[Store] = []
        self.fetches: list[Fetch] = []
        self.handed_out: list[tuple[bytes | memoryview, bytes]] = []
        self.counter = 0

    @initialize(limit=st.sampled_from([0, 40, 200, 100000]), data=st.binary(max_size=200))
    def start(self, limit: int, data: bytes) -> None:
        self.cache = PageCache(limit)
        self.file = FileContents(self.cache)
        self.server.put(0, data)
        self.server.told_size = len(data)
        self.ask_status()

    def teardown(self) -> None:
        for patch in self.patches:
            patch.stop()

    # What the caller of FileContents does

    def ask_status(self) -> None:
        self.file.set_version((0, self.server.version), self.server.told_size)

    def label(self) -> int | None:
        return None if self.file.version is None else self.file.version[1]

    def learn(self, version: int, size: int) -> None:
        """Use a status unless it is older than what is known."""
        known = self.label()
        if known is not None and version >= known:
            self.file.set_version((0, version), size)

    def size(self) -> int:
        return max(self.file.server_size, self.file.dirty_end)

    def fresh(self, length: int) -> bytes:
        """Bytes that differ from those of the writes before."""
        self.counter += 1
        return bytes((self.counter * 31 + i) % 255 + 1 for i in range(length))

    # Applications on this mount

    @rule(offset=offsets, length=lengths, kind=st.sampled_from([bytes, bytearray, memoryview]))
    def write(self, offset: int, length: int, kind: type) -> None:
        data = self.fresh(length)
        self.file.write(offset, kind(data))
        self.dirty.update(zip(range(offset, offset + length), data, strict=True))

    @rule(pieces=st.integers(1, 12), length=st.sampled_from([4, 8, 16]))
    def append(self, pieces: int, length: int) -> None:
        for _ in range(pieces):
            if self.size() < 2 * MAX_SIZE:
                self.write(self.size(), length, bytes)

    @rule(offset=offsets, length=lengths)
    def read(self, offset: int, length: int) -> None:
        if self.file.version is None:
            self.ask_status()
        size = self.size()
        data = self.file.read(offset, length, size)
        if data is None:
            indexes = self.file.missing(offset, min(length, size - offset))
            assert indexes
            for index in indexes:
                epoch = self.file.fill_epoch
                start = index * BLOCK
                piece = bytes(self.server.data[start : min(start + BLOCK, self.server.told_size)])
                if self.file.set_version((0, self.server.version), self.server.told_size):
                    return  # another version: the caller starts again
                assert self.file.fill(index, piece, epoch, (0, self.server.version))
                part = self.file.read(start, BLOCK, size)
                assert part is not None, "what was just filled can be read"
                self.compare(start, part, min(BLOCK, max(size - start, 0)))
            if self.cache.limit_bytes < 100000:
                return
            data = self.file.read(offset, length, size)
            assert data is not None
        self.compare(offset, data, max(min(length, size - offset), 0))

    def compare(self, offset: int, data: bytes | memoryview, length: int) -> None:
        assert len(data) == length
        self.handed_out = [*self.handed_out[-20:], (data, bytes(data))]
        expected = self.view(bytes(self.server.data))
        old = expected if self.before_foreign is None else self.view(self.before_foreign)
        for i, byte in enumerate(data, offset):
            assert byte in (expected[i], old[i]), i

    def view(self, server: bytes) -> bytearray:
        """What this mount shows of a file that has these bytes at the server, with zeros after it."""
        view = bytearray(server.ljust(max(self.size(), len(server)), b"\0"))
        for store in self.stores:
            view[store.extent.offset : store.extent.end] = store.extent.data
        for i, byte in self.dirty.items():
            view[i] = byte
        return view

    @precondition(lambda self: self.before_foreign is None)
    @rule(size=offsets)
    def truncate(self, size: int) -> None:
        """The caller lets stores end first, as the module asks."""
        if any(store.extent.end > size for store in self.stores):
            return
        before = self.server.version
        del self.server.data[size:]
        self.server.data.extend(bytes(size - len(self.server.data)))
        self.server.commit()
        for i in [i for i in self.dirty if i >= size]:
            del self.dirty[i]
        known = self.label()
        self.file.truncate(size, (0, self.server.version))
        if known == before:
            self.file.advance_version((0, self.server.version), size)
        else:
            self.file.set_version((0, self.server.version), size)

    @precondition(lambda self: self.before_foreign is None)
    @rule(start=offsets, length=lengths)
    def overwrite(self, start: int, length: int) -> None:
        """The server makes a hole for us. The caller lets stores end first."""
        end = min(start + length, len(self.server.data))
        if start >= end or any(store.extent.offset < end and start < store.extent.end for store in self.stores):
            return
        before = self.server.version
        self.server.put(start, bytes(end - start))
        self.server.commit()
        for i in [i for i in self.dirty if start <= i < end]:
            del self.dirty[i]
        known = self.label()
        self.file.overwritten(start, end)
        if known == before:
            self.file.advance_version((0, self.server.version), self.server.told_size)
        else:
            self.file.set_version((0, self.server.version), self.server.told_size)

    @rule(start=offsets, length=st.one_of(st.none(), lengths))
    def discard(self, start: int, length: int | None) -> None:
        end = None if length is None else start + length
        gone = sorted(i for i in self.dirty if i >= start and (end is None or i < end))
        ranges = self.file.discard_dirty(start, end)
        assert [i for a, b in ranges for i in range(a, b)] == gone
        assert all(a[1] < b[0] for a, b in itertools.pairwise(ranges))
        for i in gone:
            del self.dirty[i]

    # Stores

    @rule(max_bytes=st.sampled_from([5, 16, 64, 100]), whole_only=st.booleans())
    def begin_store(self, max_bytes: int, whole_only: bool) -> None:
        if whole_only:
            max_bytes = CELL
        extent = self.file.begin_store(max_bytes, whole_only=whole_only)
        storing = {i for store in self.stores for i in range(store.extent.offset, store.extent.end)}
        if extent is None:
            if whole_only:
                for start in range(0, 3 * MAX_SIZE, CELL):
                    cell = range(start, start + CELL)
                    assert not all(i in self.dirty for i in cell) or any(i in storing for i in cell)
            else:
                assert self.dirty.keys() <= storing
            return
        assert 0 < extent.length <= max_bytes
        assert not whole_only or (extent.length == CELL and extent.offset % CELL == 0)
        for i, byte in enumerate(extent.data, extent.offset):
            assert i not in storing
            assert self.dirty.pop(i) == byte
        self.stores.append(Store(extent))

    @precondition(lambda self: self.before_foreign is None and (self.dirty or self.stores))
    @rule(which=st.integers(0, 100))
    def apply_store(self, which: int) -> None:
        if all(store.before is not None for store in self.stores):
            self.begin_store(CELL, False)
        waiting = [store for store in self.stores if store.before is None]
        if not waiting:
            return
        store = waiting[which % len(waiting)]
        store.before = self.server.version
        self.server.put(store.extent.offset, bytes(store.extent.data))
        self.server.commit()
        store.size_after = self.server.told_size

    @precondition(lambda self: any(store.before is not None for store in self.stores))
    @rule(which=st.integers(0, 100))
    def store_reply(self, which: int) -> None:
        answered = [store for store in self.stores if store.before is not None]
        store = answered[which % len(answered)]
        assert store.before is not None
        self.stores.remove(store)
        label = self.file.version
        if store.before == self.label():
            self.file.advance_version((0, store.before + 1), store.size_after)
        else:
            self.learn(store.before + 1, store.size_after)
        self.file.stored(store.extent, (0, store.before + 1), label)

    @precondition(lambda self: self.stores)
    @rule(which=st.integers(0, 100))
    def lose_store(self, which: int) -> None:
        """The reply never comes; whether the server has the bytes is not known, so its version is not either."""
        store = self.stores.pop(which % len(self.stores))
        self.file.store_failed(store.extent)
        if store.before is not None:
            self.file.drop_clean()
        for i, byte in enumerate(store.extent.data, store.extent.offset):
            self.dirty.setdefault(i, byte)

    @precondition(lambda self: self.before_foreign is None)
    @rule(offset=offsets, length=lengths)
    def write_and_flush(self, offset: int, length: int) -> None:
        self.write(offset, length, bytes)
        while not self.stores and self.dirty:
            self.begin_store(CELL, False)
            self.apply_store(0)
            self.store_reply(0)

    # Fetches in flight

    @rule(index=st.integers(0, MAX_SIZE // BLOCK), blocks=st.integers(1, 20), reads=st.booleans())
    def fetch(self, index: int, blocks: int, reads: bool) -> None:
        self.fetches.append(
            Fetch(self.file.fill_epoch, index, blocks, self.server.version, self.server.told_size),
        )
        if reads:
            self.fetch_reads(len(self.fetches) - 1)

    @precondition(lambda self: self.fetches)
    @rule(which=st.integers(0, 100))
    def fetch_reads(self, which: int) -> None:
        fetch = self.fetches[which % len(self.fetches)]
        if fetch.data is None:
            start = fetch.index * BLOCK
            fetch.data = bytes(self.server.data[start : min(start + fetch.blocks * BLOCK, max(fetch.size, start))])

    @precondition(lambda self: any(fetch.data is not None for fetch in self.fetches))
    @rule(which=st.integers(0, 100))
    def fetch_reply(self, which: int) -> None:
        read = [fetch for fetch in self.fetches if fetch.data is not None]
        fetch = read[which % len(read)]
        assert fetch.data is not None
        self.fetches.remove(fetch)
        if self.file.version is None and fetch.epoch == self.file.fill_epoch:
            self.file.set_version((0, fetch.version), fetch.size)  # no break came since: the promise holds
        else:
            self.learn(fetch.version, fetch.size)
        usable = fetch.epoch == self.file.fill_epoch and self.label() == fetch.version
        assert self.file.fill(fetch.index, fetch.data, fetch.epoch, (0, fetch.version)) == usable

    # Other clients

    @precondition(lambda self: self.before_foreign is None)
    @rule(offset=offsets, length=lengths)
    def foreign_write_begins(self, offset: int, length: int) -> None:
        self.before_foreign = bytes(self.server.data)
        self.server.put(offset, self.fresh(length))

    @precondition(lambda self: self.before_foreign is not None)
    @rule(told=st.booleans())
    def foreign_write_ends(self, told: bool) -> None:
        self.before_foreign = None
        self.server.commit()
        self.on_break(told)

    @precondition(lambda self: self.before_foreign is None)
    @rule(size=offsets, told=st.booleans())
    def foreign_truncate(self, size: int, told: bool) -> None:
        del self.server.data[size:]
        self.server.commit()
        self.on_break(told)

    def on_break(self, told: bool) -> None:
        if told:
            assert self.file.set_version((0, self.server.version), self.server.told_size)
        else:
            self.file.drop_clean()

    @rule()
    def drop_clean(self) -> None:
        self.file.drop_clean()

    @invariant()
    def agree(self) -> None:
        if not hasattr(self, "file"):
            return
        self.file.check_invariants()
        self.cache.check_invariants()
        assert self.file.dirty_bytes == len(self.dirty) + sum(store.extent.length for store in self.stores)
        assert self.cache.dirty_bytes == self.file.dirty_bytes
        assert self.file.is_dirty == bool(self.dirty or self.stores)
        assert self.file.dirty_end == max(
            [i + 1 for i in self.dirty] + [store.extent.end for store in self.stores], default=0
        )
        if self.file.version is not None:
            for start in range(0, self.size(), BLOCK):
                data = self.file.read(start, BLOCK, self.size())
                if data is not None:
                    self.compare(start, data, min(BLOCK, self.size() - start))
        for data, then in self.handed_out:
            assert data == then, "bytes that were handed out have changed"


TestContents = Contents.TestCase
TestContents.settings = settings(max_examples=100, stateful_step_count=60, deadline=None)
