"""How far ahead of which readers."""

from __future__ import annotations

import random

from promisefs_client.data.pagecache import BLOCK_BYTES
from promisefs_client.data.readahead import FIRST_WINDOW_BYTES, Readahead

READ = 128 << 10
MAX = 8 << 20


def window(ahead: Readahead, offset: int, length: int = READ) -> int:
    start, end = ahead.want(offset, length)
    assert start % BLOCK_BYTES == end % BLOCK_BYTES == 0
    assert start <= offset and end >= offset + length
    return end - (offset + length)


def test_the_window_doubles_with_each_sequential_read() -> None:
    ahead = Readahead(MAX)
    windows = [window(ahead, i * READ) for i in range(8)]
    assert windows == [min(FIRST_WINDOW_BYTES << i, MAX) for i in range(8)]


def test_a_seek_collapses_the_window() -> None:
    ahead = Readahead(MAX)
    for i in range(8):
        window(ahead, i * READ)
    assert window(ahead, 1 << 30) == 0
    assert window(ahead, (1 << 30) + READ) == FIRST_WINDOW_BYTES


def test_for_a_new_sequence_nothing_has_begun() -> None:
    ahead = Readahead(MAX)
    window(ahead, 0)
    ahead.begun_to = MAX
    window(ahead, READ)
    assert ahead.begun_to == MAX
    window(ahead, 1 << 30)
    assert ahead.begun_to == 0


def test_going_back_to_the_start_begins_a_new_sequence() -> None:
    ahead = Readahead(MAX)
    for i in range(40):
        window(ahead, i * READ)
    assert window(ahead, 0) == FIRST_WINDOW_BYTES


def test_random_small_reads_want_just_their_block() -> None:
    ahead = Readahead(MAX)
    rng = random.Random(1)
    window(ahead, 100 << 20, 4096)
    for _ in range(1000):
        offset = rng.randrange(1 << 18) * 4096
        start, end = ahead.want(offset, 4096)
        assert (start, end) == (offset // BLOCK_BYTES * BLOCK_BYTES, (offset // BLOCK_BYTES + 1) * BLOCK_BYTES)


def test_reads_somewhat_out_of_order_are_a_sequence() -> None:
    ahead = Readahead(MAX)
    order = [i ^ 3 for i in range(64)]
    windows = [window(ahead, i * READ) for i in order]
    assert 0 not in windows
    assert windows[-1] == MAX
