"""The rules of file contents, one by one."""

from __future__ import annotations

import random

import pytest
from promisefs_client.data.contents import BLOCK_BYTES, PAGE_BYTES, STORE_BYTES, FileContents, PageCache

V1, V2, V3 = (1, 1), (1, 2), (1, 3)
LIMIT = 64 << 20


def make(size: int = 0, limit: int = LIMIT) -> FileContents:
    file = FileContents(PageCache(limit))
    file.set_version(V1, size)
    return file


def filled(data: bytes, limit: int = LIMIT) -> FileContents:
    file = make(len(data), limit)
    assert file.fill(0, data, file.fill_epoch, V1)
    return file


def cache_of(file: FileContents) -> PageCache:
    return file._cache


def pattern(length: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(length)


# Reading


def test_aligned_read_of_one_clean_block_copies_nothing() -> None:
    block = pattern(BLOCK_BYTES)
    file = filled(block)
    assert file.read(0, BLOCK_BYTES, BLOCK_BYTES) is block


def test_read_joins_blocks_and_ends_at_the_size() -> None:
    data = pattern(3 * BLOCK_BYTES + 100)
    file = filled(data)
    assert file.read(5, 1 << 30, len(data)) == data[5:]
    assert file.read(BLOCK_BYTES - 1, 2, len(data)) == data[BLOCK_BYTES - 1 : BLOCK_BYTES + 1]
    assert file.read(len(data), 10, len(data)) == b""
    assert file.read(len(data) + 10, 10, len(data)) == b""


def test_read_of_a_block_that_is_not_here_is_none() -> None:
    file = make(2 * BLOCK_BYTES)
    assert file.read(0, 1, 2 * BLOCK_BYTES) is None
    file.fill(0, bytes(BLOCK_BYTES), file.fill_epoch, V1)
    assert file.read(BLOCK_BYTES - 1, 2, 2 * BLOCK_BYTES) is None


def test_beyond_the_servers_size_are_zeros_and_nothing_is_fetched() -> None:
    file = filled(b"abc")
    file.write(10, b"x")
    file.write(2 * BLOCK_BYTES, b"y")
    assert file.missing(0, 3 * BLOCK_BYTES) == []
    expected = b"abc" + bytes(7) + b"x" + bytes(2 * BLOCK_BYTES - 11) + b"y"
    assert file.read(0, 1 << 30, file.dirty_end) == expected
    assert file.read(BLOCK_BYTES, 9, file.dirty_end) == bytes(9)


def test_without_a_version_nothing_is_known_to_be_zeros() -> None:
    file = FileContents(PageCache(LIMIT))
    assert file.read(0, 4, 4) is None
    assert file.missing(0, 2 * BLOCK_BYTES) == [0, 1]
    file.write(0, b"abcd")
    assert file.read(0, 4, 4) == b"abcd"


def test_dirty_bytes_hide_storing_ones_and_these_hide_clean_ones() -> None:
    file = filled(b"cccccccc")
    file.write(2, b"ssss")
    assert file.begin_store(STORE_BYTES)
    file.write(4, b"dddd")
    assert file.read(0, 8, 8) == b"ccssdddd"


def test_bytes_handed_out_do_not_change() -> None:
    file = filled(b"cccccccc")
    file.write(2, b"ss")
    first = file.read(0, 8, 8)
    file.write(0, b"dddddddd")
    second = file.read(0, 8, 8)
    file.write(0, b"eeeeeeee")
    assert (first, second) == (b"ccsscccc", b"dddddddd")


def test_a_block_written_from_end_to_end_need_not_be_fetched() -> None:
    file = make(3 * BLOCK_BYTES)
    file.write(BLOCK_BYTES - 1, bytes(BLOCK_BYTES + 1))
    assert file.missing(0, 3 * BLOCK_BYTES) == [0, 2]
    assert file.begin_store(STORE_BYTES)
    assert file.missing(0, 3 * BLOCK_BYTES) == [0, 2]
    assert file.read(BLOCK_BYTES - 1, BLOCK_BYTES, 3 * BLOCK_BYTES) == bytes(BLOCK_BYTES)


# Fills and versions


def test_a_fill_of_another_version_is_ignored() -> None:
    file = make(3)
    assert not file.fill(0, b"abc", file.fill_epoch, V2)
    assert file.read(0, 3, 3) is None


@pytest.mark.parametrize("event", ["drop_clean", "set_version", "truncate"])
def test_a_fill_begun_before_clean_bytes_were_voided_is_ignored(event: str) -> None:
    file = filled(b"abc")
    epoch = file.fill_epoch
    if event == "drop_clean":
        file.drop_clean()
        file.set_version(V1, 3)
    elif event == "set_version":
        file.set_version(V2, 3)
        file.set_version(V1, 3)
    else:
        file.truncate(2, V2)
        file.truncate(3, V3)
    assert not file.fill(0, b"abc", epoch, V1)


def test_the_reply_with_a_first_label_brings_the_first_blocks() -> None:
    file = FileContents(PageCache(LIMIT))
    epoch = file.fill_epoch
    assert file.set_version(V1, 3)
    assert file.fill(0, b"abc", epoch, V1)
    assert file.read(0, 3, 3) == b"abc"


def test_a_fill_replaces_no_block_that_is_there() -> None:
    file = filled(b"abc")
    file.write(0, b"xyz")
    extent = file.begin_store(STORE_BYTES)
    assert extent
    epoch = file.fill_epoch
    file.stored(extent, V2, file.version)
    assert file.fill(0, b"abc", epoch, V1)
    assert file.read(0, 3, 3) == b"xyz"


def test_a_fill_is_cut_at_the_servers_size() -> None:
    file = make(BLOCK_BYTES + 3)
    assert file.fill(0, pattern(3 * BLOCK_BYTES), file.fill_epoch, V1)
    file.check_invariants()
    assert cache_of(file).clean_bytes == BLOCK_BYTES + 3


def test_the_same_version_keeps_clean_blocks_and_another_drops_them() -> None:
    file = filled(b"abc")
    assert not file.set_version(V1, 3)
    assert file.read(0, 3, 3) == b"abc"
    assert file.set_version(V2, 3)
    assert file.read(0, 3, 3) is None
    assert cache_of(file).clean_bytes == 0


def test_dropping_clean_blocks_loses_no_write() -> None:
    file = filled(b"abcdef")
    file.write(0, b"s")
    assert file.begin_store(STORE_BYTES)
    file.write(1, b"d")
    file.drop_clean()
    assert file.read(0, 2, 6) == b"sd"
    assert file.dirty_bytes == 2


def test_own_changes_keep_clean_blocks_under_the_new_label() -> None:
    file = filled(b"abc")
    file.advance_version(V2, 5)
    assert file.version == V2
    assert file.read(0, 5, 5) == b"abc\0\0"


# Stores


def test_a_stored_extent_becomes_clean_where_it_covers_a_block() -> None:
    file = make()
    data = pattern(2 * BLOCK_BYTES + 10)
    file.write(0, data)
    extent = file.begin_store(STORE_BYTES)
    assert extent and extent.data == data
    file.stored(extent, V2, file.version)
    file.advance_version(V2, len(data))
    assert not file.is_dirty and cache_of(file).dirty_bytes == 0
    assert file.missing(0, len(data)) == []
    assert file.read(0, len(data), len(data)) == data


def test_a_stored_part_of_a_block_that_is_not_here_is_dropped() -> None:
    file = make(2 * BLOCK_BYTES)
    file.write(10, b"abc")
    extent = file.begin_store(STORE_BYTES)
    assert extent
    file.stored(extent, V2, file.version)
    assert cache_of(file).clean_bytes == 0
    assert file.missing(0, 20) == [0]


def test_a_stored_part_goes_into_a_clean_block_with_zeros_before_it() -> None:
    file = filled(b"abc")
    file.write(5, b"xy")
    extent = file.begin_store(STORE_BYTES)
    assert extent
    file.stored(extent, V2, file.version)
    file.check_invariants()
    file.advance_version(V2, 7)
    assert file.read(0, 7, 7) == b"abc\0\0xy"
    file.check_invariants()


def test_a_store_whose_label_is_gone_makes_nothing_clean() -> None:
    file = make()
    file.write(0, b"xyz")
    extent = file.begin_store(STORE_BYTES)
    assert extent
    file.drop_clean()
    file.stored(extent, V2, file.version)
    assert not file.is_dirty and cache_of(file).clean_bytes == 0


def test_a_fill_begun_before_a_store_without_a_label_ended_is_ignored() -> None:
    file = filled(b"abc")
    file.drop_clean()
    epoch = file.fill_epoch  # a fetch samples V1 and "abc"; then the store makes V2 of it
    file.write(0, b"xyz")
    extent = file.begin_store(STORE_BYTES)
    assert extent
    file.stored(extent, V2, file.version)
    file.set_version(V1, 3)
    assert not file.fill(0, b"abc", epoch, V1)


def test_a_fill_that_missed_stored_bytes_is_ignored_though_its_label_is_still_ours() -> None:
    file = make(3)
    epoch = file.fill_epoch  # a fetch samples V1 and "abc"; two stores follow, and the second is answered first
    file.write(0, b"x")
    first = file.begin_store(STORE_BYTES)
    file.write(2, b"z")
    second = file.begin_store(STORE_BYTES)
    assert first and second
    file.stored(second, V3, file.version)
    assert not file.fill(0, b"abc", epoch, V1)
    file.stored(first, V2, file.version)
    file.advance_version(V3, 3)
    assert file.read(0, 3, 3) is None


def test_a_store_that_another_client_overtook_changes_nothing_that_is_newer() -> None:
    """The break and what comes after it arrive before the store's reply, which waits for everyone's acknowledgement."""
    file = filled(b"abc")
    file.write(0, b"xyz")
    extent = file.begin_store(STORE_BYTES)
    assert extent
    file.drop_clean()
    file.set_version(V3, 3)
    file.stored(extent, V2, file.version)
    assert not file.is_dirty
    assert file.read(0, 3, 3) is None
    assert file.fill(0, b"Xyz", file.fill_epoch, V3)
    assert file.read(0, 3, 3) == b"Xyz"


def test_a_store_takes_nothing_back_in_blocks_that_are_newer() -> None:
    file = filled(b"abc")
    file.write(0, b"xyz")
    extent = file.begin_store(STORE_BYTES)
    assert extent
    file.drop_clean()
    file.set_version(V3, 3)
    assert file.fill(0, b"Xyz", file.fill_epoch, V3)
    file.stored(extent, V2, file.version)
    assert file.read(0, 3, 3) == b"Xyz"


def test_a_truncation_that_another_client_overtook_cuts_nothing_that_is_newer() -> None:
    file = filled(b"abc")
    file.drop_clean()
    file.set_version(V3, 5)
    file.truncate(2, V2)
    assert file.fill(0, b"ab\0de", file.fill_epoch, V3)
    assert file.read(0, 5, 5) == b"ab\0de"


def test_what_the_server_overwrote_for_us_is_fetched_again() -> None:
    size = 3 * BLOCK_BYTES
    file = filled(b"x" * size)
    file.write(BLOCK_BYTES - 10, b"dirty" * 4)
    epoch = file.fill_epoch
    file.overwritten(BLOCK_BYTES, 2 * BLOCK_BYTES)
    file.advance_version(V2, size)
    assert file.missing(0, size) == [1]
    assert file.read(BLOCK_BYTES - 10, 10, size) == b"dirtydirty" and file.dirty_bytes == 10
    file.overwritten(2 * BLOCK_BYTES + 100, 2 * BLOCK_BYTES + 200)
    assert file.read(2 * BLOCK_BYTES + 200, 1, size) is None
    assert file.read(2 * BLOCK_BYTES + PAGE_BYTES, 1, size) == b"x", "pages beside it are still bases"
    assert not file.fill(1, b"x" * BLOCK_BYTES, epoch, V2), "fetched before"
    assert file.fill(1, bytes(BLOCK_BYTES), file.fill_epoch, V2)
    file.check_invariants()


def test_pages_that_the_server_overwrote_for_us_are_no_bases() -> None:
    file = make(BLOCK_BYTES)
    file.write(0, b"x" * 2 * PAGE_BYTES)
    extent = file.begin_store(STORE_BYTES)
    assert extent
    file.advance_version(V2, BLOCK_BYTES)
    file.stored(extent, V2, V1)
    file.overwritten(0, PAGE_BYTES)
    assert file.read(0, 1, BLOCK_BYTES) is None
    assert file.read(PAGE_BYTES, 1, BLOCK_BYTES) == b"x"
    file.check_invariants()


def test_a_write_during_a_store_stays_dirty() -> None:
    file = make()
    file.write(0, b"aaaa")
    extent = file.begin_store(STORE_BYTES)
    assert extent
    file.write(1, b"bb")
    assert extent.data == b"aaaa"
    file.stored(extent, V2, file.version)
    assert file.dirty_bytes == 2
    assert file.read(0, 4, 4) == b"abba"


def test_a_failed_store_goes_back_under_what_was_written_meanwhile() -> None:
    file = make()
    file.write(0, b"aaaaaa")
    extent = file.begin_store(STORE_BYTES)
    assert extent
    file.write(1, b"b")
    file.write(4, b"cccc")
    file.store_failed(extent)
    assert file.read(0, 8, file.dirty_end) == b"abaacccc"
    assert file.dirty_bytes == cache_of(file).dirty_bytes == 8


def test_no_byte_is_stored_twice_at_the_same_time() -> None:
    file = make()
    file.write(4, b"aaaa")
    first = file.begin_store(STORE_BYTES)
    file.write(0, b"bbbbbbbbbbbb")
    before, after = file.begin_store(STORE_BYTES), file.begin_store(STORE_BYTES)
    assert first and before and after
    assert (before.offset, before.length) == (0, 4)
    assert (after.offset, after.length) == (8, 4)
    assert file.begin_store(STORE_BYTES) is None
    file.stored(first, V2, file.version)
    again = file.begin_store(STORE_BYTES)
    assert again and (again.offset, again.data) == (4, b"bbbb")


def test_stores_are_cut_at_multiples_of_their_size() -> None:
    file = make()
    file.write(3, bytes(20))
    extents = [file.begin_store(8) for _ in range(3)]
    assert [(e.offset, e.length) for e in extents if e] == [(3, 5), (8, 8), (16, 7)]
    assert file.begin_store(8) is None


def test_write_behind_takes_only_whole_aligned_pieces() -> None:
    file = make()
    file.write(1, bytes(STORE_BYTES + 5))
    assert file.begin_store(STORE_BYTES, whole_only=True) is None
    file.write(0, b"a")
    extent = file.begin_store(STORE_BYTES, whole_only=True)
    assert extent and (extent.offset, extent.length) == (0, STORE_BYTES)
    assert file.begin_store(STORE_BYTES, whole_only=True) is None
    assert file.dirty_bytes == STORE_BYTES + 6


def test_write_behind_skips_a_piece_that_is_being_stored() -> None:
    file = make()
    for round_ in (b"a", b"b"):
        file.write(0, round_ * 2 * STORE_BYTES)
        assert file.begin_store(STORE_BYTES, whole_only=True)
    extent = file.begin_store(STORE_BYTES, whole_only=True)
    assert extent is None
    assert file.read(STORE_BYTES - 1, 2, 2 * STORE_BYTES) == b"bb"


# Truncation and refused writes


def test_truncation_cuts_every_layer() -> None:
    file = filled(pattern(2 * BLOCK_BYTES))
    file.write(100, b"x" * 100)
    file.write(BLOCK_BYTES, b"y")
    file.truncate(150, V2)
    file.advance_version(V2, 150)
    assert (file.dirty_bytes, file.dirty_end, cache_of(file).clean_bytes) == (50, 150, 150)
    file.write(300, b"z")
    assert file.read(140, 161, 301) == b"x" * 10 + bytes(150) + b"z"
    file.check_invariants()


def test_discarding_returns_the_ranges() -> None:
    file = make()
    file.write(0, b"aaaa")
    file.write(10, b"bbbb")
    file.write(14, bytes(1 << 16))
    assert file.discard_dirty(2, 12) == [(2, 4), (10, 12)]
    assert file.discard_dirty(12, None) == [(12, 14 + (1 << 16))]
    assert file.dirty_bytes == cache_of(file).dirty_bytes == 2
    assert file.discard_dirty(100, None) == []


def test_discarding_leaves_what_is_being_stored() -> None:
    file = make()
    file.write(0, b"aaaa")
    assert file.begin_store(STORE_BYTES)
    assert file.discard_dirty(0, None) == []
    assert file.dirty_bytes == 4


# Memory


def test_least_recently_used_clean_blocks_go_first() -> None:
    cache = PageCache(2 * BLOCK_BYTES)
    one, two = FileContents(cache), FileContents(cache)
    for file in (one, two):
        file.set_version(V1, 2 * BLOCK_BYTES)
    one.fill(0, bytes(BLOCK_BYTES), one.fill_epoch, V1)
    two.fill(0, bytes(BLOCK_BYTES), two.fill_epoch, V1)
    assert one.read(0, 1, BLOCK_BYTES) is not None
    one.fill(1, bytes(BLOCK_BYTES), one.fill_epoch, V1)
    assert (one.missing(0, 2 * BLOCK_BYTES), two.missing(0, BLOCK_BYTES)) == ([], [0])
    cache.check_invariants()


def test_dirty_bytes_push_clean_blocks_out_and_never_go_themselves() -> None:
    file = filled(bytes(2 * BLOCK_BYTES), limit=2 * BLOCK_BYTES)
    file.write(1 << 30, b"x")
    assert cache_of(file).clean_bytes == BLOCK_BYTES
    file.write(1 << 31, bytes(4 * BLOCK_BYTES))
    assert cache_of(file).clean_bytes == 0
    assert file.dirty_bytes == 4 * BLOCK_BYTES + 1


def test_what_was_just_filled_can_be_read_though_dirty_bytes_are_at_the_limit() -> None:
    file = make(2 * BLOCK_BYTES, limit=10)
    file.write(1 << 30, bytes(100))
    file.fill(0, pattern(2 * BLOCK_BYTES), file.fill_epoch, V1)
    assert file.read(0, 2 * BLOCK_BYTES, 2 * BLOCK_BYTES) == pattern(2 * BLOCK_BYTES)
    file.write(0, b"x")
    assert cache_of(file).clean_bytes == 0


def test_forgetting_gives_all_memory_back() -> None:
    file = filled(bytes(3 * BLOCK_BYTES))
    file.forget()
    assert cache_of(file).clean_bytes == 0
    cache_of(file).check_invariants()


def test_forgetting_dirty_contents_is_refused() -> None:
    file = make()
    file.write(0, b"a")
    with pytest.raises(AssertionError, match="lose writes"):
        file.forget()
    assert file.dirty_bytes == 1


def page_with(**changed: int) -> bytes:
    page = bytearray(b"o" * PAGE_BYTES)
    for name, value in changed.items():
        page[int(name.removeprefix("at"))] = value
    return bytes(page)


def test_a_page_written_back_during_a_break_is_dirty_only_where_it_differs_from_its_twin() -> None:
    contents = FileContents(PageCache(1 << 20))
    contents.set_version((1, 1), PAGE_BYTES)
    contents.fill(0, page_with(), contents.fill_epoch, (1, 1))
    contents.drop_clean(keep_twins=True)
    drop = contents.keep_twins()
    contents.write(0, page_with(at3=65, at4=66, at9=67), mapped=True)
    assert contents.dirty_bytes == 3
    contents.forget_twins(drop)
    contents.set_version((1, 2), PAGE_BYTES)
    contents.fill(0, page_with(at5=90), contents.fill_epoch, (1, 2))
    assert contents.read(0, PAGE_BYTES, PAGE_BYTES) == page_with(at3=65, at4=66, at5=90, at9=67)


def test_without_a_twin_all_of_a_page_is_dirty() -> None:
    contents = FileContents(PageCache(1 << 20))
    contents.set_version((1, 1), PAGE_BYTES)
    contents.fill(0, page_with(), contents.fill_epoch, (1, 1))
    contents.drop_clean(keep_twins=True)
    contents.forget_twins(contents.keep_twins())
    contents.write(0, page_with(at3=65), mapped=True)
    assert contents.dirty_bytes == PAGE_BYTES


def mapped_file() -> FileContents:
    """One page, which the kernel has read."""
    contents = FileContents(PageCache(1 << 20))
    contents.set_version(V1, PAGE_BYTES)
    contents.fill(0, page_with(), contents.fill_epoch, V1)
    return contents


def stored_bytes(contents: FileContents) -> list[tuple[int, bytes]]:
    """What a store would carry now."""
    extents = []
    while (extent := contents.begin_store(STORE_BYTES)) is not None:
        extents.append((extent.offset, bytes(extent.data)))
    return extents


def test_a_page_written_back_under_a_promise_goes_whole_and_says_since_when_it_presumes() -> None:
    contents = mapped_file()
    contents.write(0, page_with(at3=65, at9=66), mapped=True, promised=True)
    extent = contents.begin_store(STORE_BYTES)
    assert extent and (extent.length, extent.since) == (PAGE_BYTES, V1)


def test_a_break_leaves_of_a_page_written_back_before_only_what_was_written() -> None:
    contents = mapped_file()
    contents.write(0, page_with(at3=65, at9=66), mapped=True, promised=True)
    contents.drop_clean(keep_twins=True)
    assert stored_bytes(contents) == [(3, b"A"), (9, b"B")]


def test_a_store_refused_because_another_came_before_leaves_only_what_was_written() -> None:
    contents = mapped_file()
    contents.write(0, page_with(at3=65), mapped=True, promised=True)
    extent = contents.begin_store(STORE_BYTES)
    assert extent
    contents.store_failed(extent, changed=True)
    assert stored_bytes(contents) == [(3, b"A")]
    assert cache_of(contents).dirty_bytes == 1


def test_a_store_that_failed_for_another_reason_is_repeated_whole() -> None:
    contents = mapped_file()
    contents.write(0, page_with(at3=65), mapped=True, promised=True)
    extent = contents.begin_store(STORE_BYTES)
    assert extent
    contents.store_failed(extent)
    contents.check_invariants()
    again = contents.begin_store(STORE_BYTES)
    assert again and (again.length, again.since) == (PAGE_BYTES, V1)


def test_a_failed_store_leaves_what_was_written_before_and_during_it() -> None:
    contents = mapped_file()
    contents.write(0, page_with(at3=65), mapped=True, promised=True)
    extent = contents.begin_store(STORE_BYTES)
    assert extent
    contents.write(0, page_with(at3=65, at9=66), mapped=True, promised=True)
    contents.drop_clean(keep_twins=True)
    contents.store_failed(extent)
    assert stored_bytes(contents) == [(3, b"A"), (9, b"B")]


def test_a_byte_written_by_pwrite_in_such_a_page_counts_whatever_it_is() -> None:
    contents = mapped_file()
    contents.write(0, page_with(at3=65), mapped=True, promised=True)
    contents.write(7, b"o", mapped=True, promised=True)
    contents.drop_clean(keep_twins=True)
    assert stored_bytes(contents) == [(3, b"A"), (7, b"o")]


def test_without_a_promise_or_a_mapping_equal_bytes_count_as_written() -> None:
    for mapped, promised in ((True, False), (False, True)):
        contents = mapped_file()
        contents.write(0, page_with(), mapped=mapped, promised=promised)
        contents.drop_clean()
        assert contents.dirty_bytes == PAGE_BYTES


def test_twins_stay_until_the_last_of_several_drops_has_ended() -> None:
    contents = mapped_file()
    contents.drop_clean(keep_twins=True)
    first, second = contents.keep_twins(), contents.keep_twins()
    contents.forget_twins(first)
    contents.write(0, page_with(at3=65), mapped=True)
    assert contents.dirty_bytes == 1
    contents.forget_twins(second)
    contents.write(0, page_with(at3=65), mapped=True)
    assert contents.dirty_bytes == PAGE_BYTES


def test_a_page_read_again_during_a_drop_is_compared_with_what_was_read() -> None:
    """Two breaks at once: the kernel has dropped the page for the first, and read it again, before the second."""
    contents = mapped_file()
    contents.drop_clean(keep_twins=True)
    contents.set_version(V2, PAGE_BYTES)
    contents.fill(0, page_with(at5=90), contents.fill_epoch, V2)
    contents.given(0, page_with(at5=90))
    contents.drop_clean(keep_twins=True)
    contents.write(0, page_with(at3=65, at5=90), mapped=True)
    assert stored_bytes(contents) == [(3, b"A")]


def test_zeros_behind_the_end_that_a_block_was_read_with_are_as_they_were_given() -> None:
    """The file has been made longer since, here: the kernel has read zeros there."""
    contents = FileContents(PageCache(1 << 20))
    contents.set_version(V1, 3)
    contents.fill(0, b"abc", contents.fill_epoch, V1)
    contents.advance_version(V2, 8)
    contents.drop_clean(keep_twins=True)
    contents.write(0, b"aXc" + bytes(3) + b"Y" + bytes(1), mapped=True)
    assert stored_bytes(contents) == [(1, b"X"), (6, b"Y")]


def test_zeros_behind_an_end_that_moved_elsewhere_are_the_kernels_own() -> None:
    """It was told the new size before it wrote the page back, and there are others' bytes at the server."""
    contents = FileContents(PageCache(1 << 20))
    contents.set_version(V1, 3)
    contents.fill(0, b"abc", contents.fill_epoch, V1)
    contents.drop_clean(keep_twins=True)
    contents.write(0, b"aXc" + bytes(6), mapped=True, reach=7)
    assert stored_bytes(contents) == [(1, b"X"), (7, bytes(2))]


def test_zeros_behind_the_servers_end_were_not_written_if_the_page_may_come_from_a_mapping() -> None:
    """The file is longer only here: another mount may write there too, and store first. A page that makes it longer
    counts as written unless it surely comes from a mapping."""
    contents = FileContents(PageCache(1 << 20))
    contents.set_version(V1, 3)
    contents.fill(0, b"abc", contents.fill_epoch, V1)
    contents.write(PAGE_BYTES + 7, b"far")
    contents.write(100, b"\0")
    page = bytearray(PAGE_BYTES)
    page[:3], page[5:7] = b"aXc", b"YY"
    contents.write(0, bytes(page), mapped=True, promised=True)
    behind = bytearray(PAGE_BYTES)
    behind[3], behind[7:10] = 65, b"far"
    contents.write(PAGE_BYTES, bytes(behind), mapped=True, promised=True, written_back=True)
    contents.drop_clean(keep_twins=True)
    page[9] = 90
    contents.write(0, bytes(page), mapped=True, promised=True, written_back=True)
    assert stored_bytes(contents) == [
        (1, b"X"), (5, b"YY"), (9, b"Z"), (100, b"\0"), (PAGE_BYTES + 3, b"A"), (PAGE_BYTES + 7, b"far"),
    ]  # fmt: skip


def test_a_mapping_that_changes_a_byte_back_to_an_older_value_has_written_it() -> None:
    contents = mapped_file()
    contents.drop_clean(keep_twins=True)
    contents.given(0, page_with(at5=90))
    contents.write(0, page_with(), mapped=True)
    assert stored_bytes(contents) == [(5, b"o")]


def test_what_lies_beyond_the_servers_end_is_never_presumed() -> None:
    contents = FileContents(PageCache(1 << 20))
    contents.set_version(V1, 3)
    contents.fill(0, b"abc", contents.fill_epoch, V1)
    contents.write(0, b"aXc" + bytes(5), mapped=True, promised=True)
    contents.drop_clean()
    assert stored_bytes(contents) == [(1, b"X"), (3, bytes(5))]


def test_a_break_takes_away_what_is_only_presumed_in_a_store_on_its_way() -> None:
    contents = mapped_file()
    contents.write(0, page_with(at3=65), mapped=True, promised=True)
    extent = contents.begin_store(STORE_BYTES)
    assert extent
    contents.drop_clean(keep_twins=True)
    contents.set_version(V2, PAGE_BYTES)
    assert contents.missing(0, PAGE_BYTES) == [0]
    contents.fill(0, page_with(at5=90), contents.fill_epoch, V2)
    assert contents.read(0, PAGE_BYTES, PAGE_BYTES) == page_with(at3=65, at5=90)
    contents.check_invariants()
    contents.write(5, b"x")
    assert contents.begin_store(STORE_BYTES) is None, "the whole page is still on its way"


def test_a_page_written_back_again_after_its_block_was_evicted_is_still_presumed() -> None:
    contents = mapped_file()
    contents.write(0, page_with(at3=65), mapped=True, promised=True)
    cache_of(contents).limit_bytes = 0
    cache_of(contents).evict()
    contents.write(0, page_with(at3=65, at9=66), mapped=True, promised=True)
    contents.drop_clean()
    assert stored_bytes(contents) == [(3, b"A"), (9, b"B")]


def test_a_page_given_over_a_newer_version_is_no_base_for_what_is_written_into_it() -> None:
    contents = mapped_file()
    contents.write(0, b"abc")
    extent = contents.begin_store(STORE_BYTES)
    assert extent
    contents.drop_clean(keep_twins=True)
    contents.forget_twins(contents.keep_twins())
    contents.set_version(V3, PAGE_BYTES)
    contents.fill(0, page_with(at0=88), contents.fill_epoch, V3)
    page = bytearray(contents.read(0, PAGE_BYTES, PAGE_BYTES) or b"")
    page[9] = 77
    contents.write(0, bytes(page), mapped=True, promised=True)
    assert contents.stored(extent, V2, V3)
    assert stored_bytes(contents) == [(9, b"M")]


def test_a_page_stored_when_there_was_no_label_is_a_base() -> None:
    contents = FileContents(PageCache(1 << 20))
    contents.write(0, page_with(), mapped=True)
    extent = contents.begin_store(STORE_BYTES)
    assert extent
    contents.set_version(V2, 2 * PAGE_BYTES)
    assert not contents.stored(extent, V2, None)
    contents.write(0, page_with(at3=65), mapped=True, promised=True)
    contents.check_invariants()
    contents.drop_clean()
    assert stored_bytes(contents) == [(3, b"A")]


@pytest.mark.parametrize("event", ["cut", "fetched", "dropped", "written over"])
def test_pages_of_a_block_that_is_not_here_follow_what_happens_to_it(event: str) -> None:
    file = make(3 * PAGE_BYTES)
    file.write(PAGE_BYTES, page_with())
    extent = file.begin_store(STORE_BYTES)
    assert extent
    file.advance_version(V2, 3 * PAGE_BYTES)
    file.stored(extent, V2, V1)
    assert cache_of(file).clean_bytes == PAGE_BYTES
    assert file.read(PAGE_BYTES, PAGE_BYTES, 3 * PAGE_BYTES) == page_with()
    assert file.missing(0, 3 * PAGE_BYTES) == [0]
    assert file.read(PAGE_BYTES - 1, 2, 3 * PAGE_BYTES) is None
    if event == "cut":
        file.truncate(PAGE_BYTES + 2, V3)
        assert cache_of(file).clean_bytes == 2
    elif event == "fetched":
        assert file.fill(0, bytes(PAGE_BYTES) + page_with() + bytes(PAGE_BYTES), file.fill_epoch, V2)
        assert cache_of(file).clean_bytes == 3 * PAGE_BYTES
    elif event == "dropped":
        file.drop_clean()
        assert cache_of(file).clean_bytes == 0
    else:
        file.write(PAGE_BYTES - 1, b"XY")
        again = file.begin_store(STORE_BYTES)
        assert again
        file.advance_version(V3, 3 * PAGE_BYTES)
        file.stored(again, V3, V2)
        assert file.read(PAGE_BYTES, 2, 3 * PAGE_BYTES) == b"Yo"
    file.check_invariants()
    cache_of(file).check_invariants()
