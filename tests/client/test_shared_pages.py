"""Random histories of pages that two mounts write: no byte that one of them wrote is undone by the other.

This mount writes only even bytes, through a mapping or by pwrite; the other mount stores only odd ones. The kernel
writes dirty pages back whole at any time; breaks arrive late and overlap; stores are refused, fail, or are lost. In
the end the server must have the last value of each byte.
"""

from __future__ import annotations

from random import Random
from unittest import mock

import pytest
from promisefs_client.data import clean, contents, dirty, pagecache, whole_pages, written
from promisefs_client.data.contents import FileContents, PageCache, StoreExtent

PAGE, BLOCK, CELL, SIZE = 4, 8, 16, 16
HISTORIES, STEPS = 600, 60


class SharedPages:
    def __init__(self) -> None:
        self.patches = [
            mock.patch.object(contents, "BLOCK_BYTES", BLOCK),
            mock.patch.object(pagecache, "BLOCK_BYTES", BLOCK),
            mock.patch.object(clean, "BLOCK_BYTES", BLOCK),
            mock.patch.object(clean, "PAGE_BYTES", PAGE),
            mock.patch.object(dirty, "PAGE_BYTES", PAGE),
            mock.patch.object(contents, "PAGE_BYTES", PAGE),
            mock.patch.object(whole_pages, "PAGE_BYTES", PAGE),
            mock.patch.object(written, "PAGE_BYTES", PAGE),
            mock.patch.object(contents, "STORE_BYTES", CELL),
            mock.patch.object(dirty, "STORE_BYTES", CELL),
            mock.patch.object(written, "STORE_BYTES", CELL),
        ]
        for patch in self.patches:
            patch.start()
        self.cache = PageCache(1 << 20)
        self.file = FileContents(self.cache)
        self.server = bytearray(SIZE)
        self.version = 1
        self.foreign_version = 1  # the last one that the other mount made
        self.expected = bytearray(SIZE)
        self.breaks = 0  # sent, not arrived
        self.promised = False
        self.kernel: dict[int, bytearray] = {}
        self.kernel_dirty: set[int] = set()
        self.drops: list[tuple[int, set[int]]] = []  # number, pages still to be dropped
        self.stores: list[tuple[StoreExtent, int | None]] = []  # with the version that it was applied to
        self.answered: StoreExtent | None = None  # one whose reply is not lost: it would be stored again, over others'

    def start(self) -> None:
        self.validate()

    def end(self) -> None:
        for patch in self.patches:
            patch.stop()

    # This mount's daemon

    def validate(self) -> None:
        known = self.file.version
        if self.file.set_version((0, self.version), SIZE, keep_twins=True) and known is not None:
            self.begin_drop()
        self.promised = self.breaks == 0

    def begin_drop(self) -> None:
        self.drops.append((self.file.keep_twins(), set(self.kernel)))

    def write(self, offset: int, data: bytes) -> None:
        self.file.write(offset, data, mapped=True, promised=self.promised)

    # The kernel

    def read(self, page: int) -> None:
        if page in self.kernel:
            return
        if not self.promised:
            self.validate()
        at = page * PAGE
        while (data := self.file.read(at, PAGE, SIZE)) is None:
            epoch = self.file.fill_epoch
            if self.file.version != (0, self.version):
                self.validate()
                continue
            index = self.file.missing(at, PAGE)[0]
            piece = bytes(self.server[index * BLOCK : (index + 1) * BLOCK])
            assert self.file.fill(index, piece, epoch, (0, self.version))
        self.file.given(at, data)
        self.kernel[page] = bytearray(data)
        if not self.promised:
            self.begin_drop()

    def store_into_mapping(self, page: int, within: int, value: int) -> None:
        self.read(page)
        self.kernel[page][2 * within] = value
        self.kernel_dirty.add(page)
        self.expected[page * PAGE + 2 * within] = value

    def pwrite(self, page: int, within: int, value: int) -> None:
        if page in self.kernel:
            self.kernel[page][2 * within] = value
        self.expected[page * PAGE + 2 * within] = value
        self.write(page * PAGE + 2 * within, bytes([value]))

    def pwrite_page(self, page: int, within: int, value: int) -> None:
        """All of a page, so that the kernel has it without having read it; while nothing else goes on."""
        if not self.promised or self.breaks or self.stores or page in self.kernel_dirty or self.file.is_dirty:
            return
        at = page * PAGE
        data = bytearray(self.server[at : at + PAGE])
        data[2 * within] = self.expected[at + 2 * within] = value
        self.kernel[page] = data
        self.write(at, bytes(data))
        while self.file.is_dirty:
            self.begin_store()
            self.store_arrives(0)
            if value == 0:
                self.answered = self.stores[-1][0]  # its reply comes later
                return
            self.store_ends(0, False)

    def launder(self, which: int) -> None:
        if not self.kernel_dirty:
            return
        page = sorted(self.kernel_dirty)[which % len(self.kernel_dirty)]
        self.kernel_dirty.discard(page)
        self.write(page * PAGE, bytes(self.kernel[page]))

    def drop_page(self, which: int) -> None:
        if not self.drops:
            return
        number, pages = self.drops[which % len(self.drops)]
        if pages:
            page = pages.pop()
            if page in self.kernel_dirty:
                self.kernel_dirty.discard(page)
                self.write(page * PAGE, bytes(self.kernel[page]))
            self.kernel.pop(page, None)
        else:
            self.drops.remove((number, pages))
            self.file.forget_twins(number)

    # Stores

    def begin_store(self) -> None:
        extent = self.file.begin_store(CELL)
        if extent is not None:
            self.stores.append((extent, None))

    def store_arrives(self, which: int) -> None:
        if not self.stores:
            return
        index = which % len(self.stores)
        extent, before = self.stores[index]
        if before is not None:
            return
        if extent.since is not None and extent.since[1] < self.foreign_version:
            del self.stores[index]
            self.file.store_failed(extent, changed=True)
            return
        self.stores[index] = (extent, self.version)
        self.server[extent.offset : extent.end] = extent.data
        self.version += 1

    def store_ends(self, which: int, lost: bool) -> None:
        if not self.stores:
            return
        extent, before = self.stores.pop(which % len(self.stores))
        if (lost and extent is not self.answered) or before is None:
            self.file.store_failed(extent)
            if before is not None:
                self.promised = False
                self.file.drop_clean(keep_twins=True)
                self.begin_drop()
        else:
            label = self.file.version
            if label == (0, before):
                self.file.advance_version((0, before + 1), SIZE)
            elif label is None:
                self.file.set_version((0, before + 1), SIZE)
            elif label < (0, before + 1):
                self.file.set_version((0, before + 1), SIZE, keep_twins=True)
                self.begin_drop()
            if self.file.stored(extent, (0, before + 1), label):
                self.begin_drop()

    # The other mount

    def foreign_store(self, page: int, within: int, value: int) -> None:
        at = page * PAGE + 2 * within + 1
        self.server[at] = self.expected[at] = value
        self.version += 1
        self.foreign_version = self.version
        self.breaks += 1

    def break_arrives(self) -> None:
        if not self.breaks:
            return
        self.breaks -= 1
        self.promised = False
        self.file.drop_clean(keep_twins=True)
        self.begin_drop()

    def quiesce(self) -> None:
        while self.breaks:
            self.break_arrives()
        while self.kernel_dirty:
            self.launder(0)
        while self.drops:
            self.drop_page(0)
        while self.file.is_dirty:
            if not self.stores:
                self.begin_store()
            self.store_arrives(0)
            if self.stores:
                self.store_ends(0, False)

    def agree(self) -> None:
        self.file.check_invariants()
        self.cache.check_invariants()
        assert self.cache.dirty_bytes == self.file.dirty_bytes

    def step(self, random: Random) -> None:
        page, within = random.randrange(SIZE // PAGE), random.randrange(PAGE // 2)
        value, which = random.randrange(4), random.randrange(100)  # few values, so that equal bytes are common
        random.choice(
            (
                lambda: self.read(page),
                lambda: self.store_into_mapping(page, within, value),
                lambda: self.store_into_mapping(page, within, value),
                lambda: self.pwrite(page, within, value),
                lambda: self.pwrite_page(page, within, value),
                lambda: self.launder(which),
                lambda: self.launder(which),
                lambda: self.drop_page(which),
                lambda: self.drop_page(which),
                self.begin_store,
                self.begin_store,
                lambda: self.store_arrives(which),
                lambda: self.store_ends(which, value == 0),
                lambda: self.foreign_store(page, within, value),
                self.break_arrives,
            )
        )()


@pytest.mark.parametrize("first_seed", range(0, HISTORIES, 100))
def test_no_byte_of_either_is_undone(first_seed: int) -> None:
    for seed in range(first_seed, first_seed + 100):
        random = Random(seed)
        pages = SharedPages()
        try:
            pages.start()
            for _ in range(STEPS):
                pages.step(random)
                pages.agree()
            pages.quiesce()
            assert pages.server == pages.expected, f"seed {seed}"
        finally:
            pages.end()
