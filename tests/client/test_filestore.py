"""The data layer of a mount against a real server: everything but the kernel."""

from __future__ import annotations

import errno
import os
from types import SimpleNamespace
from typing import cast

import pyfuse3
import pytest
import trio
from client_mount import ClientMount, World, new_file, settled
from promisefs_client.data.contents import BLOCK_BYTES, PAGE_BYTES
from promisefs_client.data.pagecache import CLEAN_SHARE
from promisefs_client.errors import FsError, ServerUnavailable
from promisefs_client.fuse.attributes import MTIME_LAG_NS, attributes_of
from promisefs_client.fuse.requests import Request, handling
from promisefs_client.vnodes.vnode import Vnode
from promisefs_protocol.abort import AbortCode, Aborted
from promisefs_protocol.ids import Fid
from promisefs_protocol.messages import FetchData, GiveUpOpen, InlineBulkStatus, StoreData, StoreStatus, Sync
from server_cell import Client, in_background


def size_to(fid: Fid, size: int) -> StoreStatus:
    return StoreStatus(fid, None, None, None, size, None, None)


# Changes whose outcome is not known


async def test_what_a_store_without_an_answer_may_have_changed_is_asked_for_again(
    world: World, mount: ClientMount
) -> None:
    """The server breaks no promise of who made a change, so the client takes its own promise away."""
    _, fid = await new_file(world, b"old")
    vnode = await mount.open(b"file")
    assert await mount.read(vnode) == b"old"
    mount.session.lose_reply.add(StoreStatus)
    with pytest.raises(ServerUnavailable):
        await mount.files.truncate(vnode, size_to(fid, 1))
    assert not mount.cell.valid(vnode)
    assert await mount.read(vnode) == b"o"
    assert vnode.status.size == 1
    await settled()
    assert vnode.ino in [work.ino for work in mount.kernel.dropped if work.pages]


async def test_a_call_without_an_answer_that_changes_nothing_costs_no_promise(world: World, mount: ClientMount) -> None:
    await new_file(world, b"x" * 2 * BLOCK_BYTES)
    vnode = await mount.open(b"file")
    assert await mount.read(vnode, 0, 1) == b"x"
    mount.session.lose_reply.add(FetchData)
    with pytest.raises(ServerUnavailable):
        await mount.read(vnode, BLOCK_BYTES, 1)
    assert mount.cell.valid(vnode)


# Reading


async def test_readers_that_need_the_same_blocks_at_different_times_all_end(world: World, mount: ClientMount) -> None:
    """Each block has one fetch at a time, and whoever waits for it is woken by that one."""
    content = bytes(range(256)) * (5 * BLOCK_BYTES // 256)
    await new_file(world, content)
    vnode = await mount.open(b"file")
    await mount.read(vnode, 2 * BLOCK_BYTES, 1)
    done: list[tuple[int, bytes]] = []

    async def read(first: int, last: int) -> None:
        done.append((first, await mount.read(vnode, first * BLOCK_BYTES, (last + 1 - first) * BLOCK_BYTES)))

    async with trio.open_nursery() as nursery:
        mount.session.hold_after[FetchData] = first_gate = trio.Event()
        nursery.start_soon(read, 1, 3)  # needs 1 and 3, and fetches 1 first
        await settled()
        mount.session.hold_after[FetchData] = second_gate = trio.Event()
        nursery.start_soon(read, 3, 3)
        await settled()
        nursery.start_soon(read, 3, 4)  # waits for that one's fetch
        await settled()
        first_gate.set()
        await settled()
        second_gate.set()
        with trio.move_on_after(5):
            while len(done) < 3:
                await settled()
        nursery.cancel_scope.cancel()
    assert sorted((first, len(data)) for first, data in done) == [
        (1, 3 * BLOCK_BYTES),
        (3, BLOCK_BYTES),
        (3, 2 * BLOCK_BYTES),
    ]
    fetches = [(call.offset, call.length) for call in mount.session.sent_of(FetchData)]
    assert len(fetches) == len(set(fetches)), "a block was fetched twice"


async def test_a_block_that_the_server_cannot_read_is_an_error_not_a_wait(world: World, mount: ClientMount) -> None:
    """Readahead that fails says nothing; the read itself has to meet the failure."""
    await new_file(world, bytes(2 * BLOCK_BYTES))
    vnode = await mount.open(b"file")
    mount.session.refuse[FetchData] = AbortCode.IO
    with trio.fail_after(5), pytest.raises(Aborted) as caught:
        await mount.read(vnode, BLOCK_BYTES, 1)
    assert caught.value.code == AbortCode.IO


async def test_a_read_of_two_blocks_ends_though_dirty_bytes_fill_the_cache(world: World, mount: ClientMount) -> None:
    """A share of the cache is for clean blocks, else each of the two would drive out the other for ever."""
    other, _ = await new_file(world, bytes(2 * BLOCK_BYTES))
    await other.create(b"dirty")
    dirty = await mount.open(b"dirty")
    mount.pages.limit_bytes = 2 * CLEAN_SHARE * BLOCK_BYTES
    mount.session.hold_before[StoreData] = trio.Event()
    mount.files.contents(dirty).write(0, bytes(mount.pages.limit_bytes))
    vnode = await mount.open(b"file")
    contents = mount.files.contents(vnode)
    # The two are fetched one after the other, as a kernel's READ that straddles them may need.
    await mount.read(vnode, BLOCK_BYTES, 1)
    with trio.fail_after(5):
        assert await mount.read(vnode, BLOCK_BYTES - 1, 2) == b"\0\0"
    assert contents.missing(0, 2 * BLOCK_BYTES) == []
    mount.files.contents(dirty).discard_dirty(0, None)


# Bytes that cannot be stored


async def test_a_store_that_is_overtaken_by_the_last_close_of_a_removed_file_loses_nothing(
    world: World, mount: ClientMount
) -> None:
    """Nobody can ever read it: it is no failure."""
    await new_file(world, b"abc")
    vnode = await mount.names.lookup(mount.root, b"file")
    assert vnode is not None
    mount.table.add_lookup(vnode)
    handle = await mount.open_handle(vnode, os.O_WRONLY)
    await mount.operations.write(handle, 0, b"dirty")
    await mount.names.remove_file(mount.root, b"file")
    mount.session.hold_before[StoreData] = gate = trio.Event()
    async with in_background(mount.files.store(vnode, sync=False)) as storing:
        await mount.operations.release(handle)
        with trio.fail_after(5):
            while not mount.session.sent_of(GiveUpOpen):
                await settled()
            gate.set()
            while not storing.done:
                await settled()
        assert storing.error is None
    assert (mount.files.refuser.files_lost, mount.files.store_failures, mount.files.dirty_files) == (0, 0, 0)


async def test_bytes_lost_because_their_file_was_removed_are_reported_from_then_on(
    world: World, mount: ClientMount
) -> None:
    other, _ = await new_file(world, b"")
    vnode = await mount.open(b"file")
    await mount.files.write(vnode, 0, b"lost")
    await other.unlink(b"file")
    await mount.session.call(GiveUpOpen((vnode.fid,)))  # so it is kept for nobody
    with pytest.raises(Aborted):
        await mount.files.store(vnode, sync=False)
    for attempt in (mount.files.store(vnode, sync=True), mount.files.write(vnode, 0, b"more")):
        with pytest.raises(FsError) as caught:
            await attempt
        assert caught.value.errno == errno.ESTALE
    assert mount.pages.dirty_bytes == 0


async def test_memory_for_what_cannot_be_stored_is_bounded(world: World, mount: ClientMount) -> None:
    await new_file(world, b"")
    vnode = await mount.open(b"file")
    mount.session.refuse[StoreData] = AbortCode.TOO_MANY
    limit, piece = mount.pages.limit_bytes, bytes(1 << 20)
    with pytest.raises(Aborted) as caught:
        for offset in range(0, 4 * limit, len(piece)):
            await mount.files.write(vnode, offset, piece)
    assert caught.value.code == AbortCode.TOO_MANY
    assert limit < mount.pages.dirty_bytes <= limit + len(piece)
    del mount.session.refuse[StoreData]
    await mount.files.write(vnode, 0, b"room was made")
    await mount.files.store(vnode, sync=False)
    assert mount.pages.dirty_bytes == 0


async def test_a_file_that_was_lost_does_not_keep_others_from_being_stored_at_the_end(
    world: World, mount: ClientMount
) -> None:
    other, _ = await new_file(world, b"")
    vnode = await mount.open(b"file")
    await mount.files.write(vnode, 0, b"lost")
    await other.unlink(b"file")
    await mount.session.call(GiveUpOpen((vnode.fid,)))
    with pytest.raises(Aborted):
        await mount.files.store(vnode, sync=False)
    kept = await other.create(b"kept")
    await mount.files.write(await mount.open(b"kept"), 0, b"kept")
    assert await mount.files.store_all() == []
    assert await other.fetch(kept.fid) == b"kept"


async def test_write_behind_that_has_not_begun_keeps_the_lock_of_its_file(world: World, mount: ClientMount) -> None:
    """Else the file would have two: a store under the one could pass a truncation under the other."""
    await new_file(world, b"")
    vnode = await mount.open(b"file")
    state = mount.files._state(vnode)
    state.background = True
    mount.close(vnode)
    assert mount.files._state(vnode) is state
    state.background = False
    mount.files.released(vnode)


# Growth elsewhere


async def test_growth_elsewhere_is_shown_to_a_mapping_that_may_reach_there(world: World, mount: ClientMount) -> None:
    other, fid = await new_file(world, b"abc")
    vnode = await mount.open(b"file")
    await mount.read(vnode)
    await other.store(fid, b"de", 3)
    assert mount.kernel.bytes_shown == [(vnode.ino, 4, b"e")]


async def test_growth_is_shown_also_after_a_change_that_was_none(world: World, mount: ClientMount) -> None:
    """A break takes the promise. Without one nobody would tell of what comes next: so it is renewed at once."""
    other, fid = await new_file(world, b"abc")
    vnode = await mount.open(b"file")
    await mount.read(vnode)
    await other.store(fid, b"x", 0)
    await other.store(fid, b"de", 3)
    assert mount.kernel.bytes_shown == [(vnode.ino, 4, b"e")]


async def test_growth_from_before_a_file_was_opened_is_shown_when_it_is(world: World, mount: ClientMount) -> None:
    """The kernel keeps the size that it knew; attributes that it asks for may be overtaken by an invalidation."""
    other, fid = await new_file(world, b"abc")
    vnode = await mount.names.lookup(mount.root, b"file")
    assert vnode is not None
    vnode = mount.table.add_lookup(vnode)
    vnode.kernel_size.believes(3)
    await other.store(fid, b"de", 3)
    await mount.open_handle(vnode, os.O_RDONLY)
    assert mount.kernel.bytes_shown == [(vnode.ino, 4, b"e")]


async def test_growth_is_shown_to_a_kernel_that_took_a_short_read_for_the_end(world: World, mount: ClientMount) -> None:
    """A mapping would get SIGBUS there, though the file has not grown beyond what the kernel was told before."""
    other, fid = await new_file(world, b"abcde")
    vnode = await mount.open(b"file")
    handle = await mount.open_handle(vnode, os.O_RDONLY)
    await other.truncate(fid, 1)
    assert bytes(await mount.operations.read(handle, 0, PAGE_BYTES)) == b"a"
    await other.store(fid, b"xy", 1)
    assert mount.kernel.bytes_shown == [(vnode.ino, 2, b"y")]


async def test_no_byte_is_shown_while_somebody_here_appends(world: World, mount: ClientMount) -> None:
    """It might get into what is being appended, which lies in the kernel's pages at its own idea of the end."""
    other, fid = await new_file(world, b"abc")
    vnode = await mount.open(b"file")
    handle = await mount.open_handle(vnode, os.O_WRONLY | os.O_APPEND)
    mount.kernel.believed_size = 5
    await other.store(fid, b"de", 3)
    assert (mount.kernel.asked, vnode.kernel_size.least) == ([vnode.ino], 5)
    vnode.kernel_size.believes(3)
    mount.kernel.believed_size = 6
    await mount.operations.write(handle, 3, b"f")
    await settled()
    assert mount.kernel.asked == [vnode.ino] * 2 and mount.kernel.bytes_shown == []
    await mount.operations.release(handle)
    await other.store(fid, b"g", 6)
    assert mount.kernel.bytes_shown == [(vnode.ino, 6, b"g")]


async def test_a_break_waits_until_the_kernel_has_taken_a_shown_byte_in(world: World, mount: ClientMount) -> None:
    """Else it would drop the pages first, and the byte would come after."""
    other, fid = await new_file(world, b"abc")
    vnode = await mount.open(b"file")
    mount.kernel.stores_end = trio.Event()
    async with in_background(other.store(fid, b"de", 3)):
        mount.kernel.dropped.clear()
        async with in_background(other.store(fid, b"x", 4)):
            assert mount.kernel.bytes_shown == [(vnode.ino, 4, b"e")]
            assert mount.drops_of_pages(vnode) == 0
            mount.kernel.stores_end.set()
            await settled()
            assert mount.drops_of_pages(vnode) == 1


@pytest.mark.parametrize("event", ["written here", "cut here"])
async def test_nothing_is_shown_over_what_happened_while_the_new_end_was_fetched(
    world: World, mount: ClientMount, event: str
) -> None:
    other, fid = await new_file(world, b"abc")
    vnode = await mount.open(b"file")
    await mount.read(vnode)
    mount.session.hold_after[FetchData] = gate = trio.Event()
    async with in_background(other.store(fid, b"de", 3)):
        if event == "written here":
            await mount.files.write(vnode, 4, b"X")
        else:
            await mount.files.truncate(vnode, size_to(fid, 2))
        gate.set()
        await settled()
    assert mount.kernel.bytes_shown == ([(vnode.ino, 4, b"X")] if event == "written here" else [])


async def test_a_truncation_that_the_shown_byte_overtook_is_told_to_the_kernel_again(
    world: World, mount: ClientMount
) -> None:
    other, fid = await new_file(world, b"abc")
    vnode = await mount.open(b"file")
    await mount.read(vnode)
    mount.kernel.stores_end = trio.Event()
    async with in_background(other.store(fid, b"de", 3)):
        before = mount.drops_of_pages(vnode)
        await mount.files.truncate(vnode, size_to(fid, 2))
        mount.kernel.stores_end.set()
        await settled()
    assert mount.drops_of_pages(vnode) > before


async def test_a_truncation_whose_answer_comes_after_a_later_change_cuts_nothing_of_that(
    world: World, mount: ClientMount
) -> None:
    """Found by the simulation: the mount went on reading zeros behind its own cut, where the other had stored."""
    other, fid = await new_file(world, b"abc")
    vnode = await mount.open(b"file")
    mount.session.hold_after[StoreStatus] = gate = trio.Event()
    async with in_background(mount.files.truncate(vnode, size_to(fid, 0))):
        await settled()
        await other.store(fid, b"later", 0)
        assert await mount.read(vnode) == b"later"
        gate.set()
        await settled()
    assert await mount.read(vnode) == b"later"


async def test_a_write_that_a_shown_byte_may_have_covered_in_the_kernel_is_read_again(
    world: World, mount: ClientMount
) -> None:
    """It was in the kernel's page before the byte was put there, and reaches us after it."""
    other, fid = await new_file(world, b"abc")
    vnode = await mount.open(b"file")
    await mount.read(vnode)
    handle = await mount.open_handle(vnode, os.O_RDWR)
    await other.store(fid, b"de", 3)
    before = mount.drops_of_pages(vnode)
    await mount.operations.write(handle, 3, b"DEF")
    await settled()
    assert mount.drops_of_pages(vnode) == before + 1
    await mount.operations.write(handle, 3, b"DEF")
    await settled()
    assert mount.drops_of_pages(vnode) == before + 1
    await mount.operations.release(handle)


# Times


async def test_the_mtime_that_is_stored_is_that_of_the_last_write(
    world: World, mount: ClientMount, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, fid = await new_file(world, b"")
    vnode = await mount.open(b"file")
    clock = 10**18
    monkeypatch.setattr("time.time_ns", lambda: clock)
    for second in range(3):
        clock = 10**18 + second * MTIME_LAG_NS // 4
        await mount.files.write(vnode, second, b"x")
        assert attributes_of(vnode, 0, 0).st_mtime_ns == 10**18, "the kernel would drop its pages at each write"
    clock += 2 * MTIME_LAG_NS
    await mount.files.write(vnode, 3, b"x")
    assert attributes_of(vnode, 0, 0).st_mtime_ns == clock, "who looks on for longer sees that it is written to"
    clock += 5
    await mount.files.write(vnode, 4, b"x")
    await mount.files.store(vnode, sync=False)
    assert (await other.stat(fid)).status.mtime_ns == clock == attributes_of(vnode, 0, 0).st_mtime_ns


async def test_a_truncation_counts_as_a_write_and_its_time_stays(world: World, mount: ClientMount) -> None:
    other, fid = await new_file(world, b"")
    vnode = await mount.open(b"file")
    await mount.files.write(vnode, 0, b"abc")
    await mount.files.truncate(vnode, size_to(fid, 2))
    cut_at = (await other.stat(fid)).status.mtime_ns
    await mount.files.store(vnode, sync=False)
    assert (await other.stat(fid)).status.mtime_ns == cut_at


async def test_the_kernel_is_to_ask_again_after_a_change_of_attributes(world: World, mount: ClientMount) -> None:
    """It takes the attributes of SETATTR's answer as they are, also when a break's invalidation has overtaken them."""
    await new_file(world, b"abc")
    vnode = await mount.open(b"file")
    fields = SimpleNamespace(
        update_mode=True, update_uid=False, update_gid=False, update_size=False, update_atime=False, update_mtime=False
    )
    wanted = pyfuse3.EntryAttributes()
    wanted.st_mode = 0o100600
    context = pyfuse3.RequestContext()
    answer = await mount.operations.setattr(vnode.ino, wanted, cast(pyfuse3.SetattrFields, fields), None, context)
    assert (answer.st_mode, answer.attr_timeout) == (0o100600, 0)
    assert (await mount.operations.getattr(vnode.ino, context)).attr_timeout > 0


# Pages that two mounts write


async def written_back_page(world: World, mount: ClientMount) -> tuple[Client, Fid, Vnode, int]:
    """A page of which a process here has written byte 3 through a mapping; the kernel has just written it back."""
    other, fid = await new_file(world, b"o" * PAGE_BYTES)
    vnode = await mount.open(b"file")
    handle = await mount.open_handle(vnode, os.O_RDWR)
    page = bytearray(await mount.operations.read(handle, 0, PAGE_BYTES))
    page[3] = ord("A")
    await mount.operations.write(handle, 0, bytes(page))
    return other, fid, vnode, handle


async def test_a_page_written_back_before_a_break_does_not_undo_what_the_break_was_for(
    world: World, mount: ClientMount
) -> None:
    other, fid, _, handle = await written_back_page(world, mount)
    await other.store(fid, b"B", 9)
    await mount.operations.fsync(handle, False)
    assert await other.fetch(fid) == page_with(at3="A", at9="B")


async def test_a_page_on_its_way_to_the_server_when_another_stores_does_not_undo_it(
    world: World, mount: ClientMount
) -> None:
    other, fid, _, handle = await written_back_page(world, mount)
    mount.session.hold_before[StoreData] = gate = trio.Event()
    async with in_background(mount.operations.fsync(handle, False)) as fsync:
        await other.store(fid, b"B", 9)
        assert await other.fetch(fid) == page_with(at9="B")
        gate.set()
        with trio.fail_after(5):
            while not fsync.done:
                await settled()
        assert fsync.error is None
    assert await other.fetch(fid) == page_with(at3="A", at9="B")
    assert [len(call.since or ()) for call in mount.session.sent_of(StoreData)] == [2, 0]


async def test_a_page_written_back_while_a_promise_is_renewed_does_not_undo_the_next_store(
    world: World, mount: ClientMount
) -> None:
    """A break of the status alone takes the promise too, for as long as it takes to ask again."""
    other, fid = await new_file(world, b"o" * PAGE_BYTES)
    vnode = await mount.open(b"file")
    handle = await mount.open_handle(vnode, os.O_RDWR)
    page = bytearray(await mount.operations.read(handle, 0, PAGE_BYTES))
    mount.session.hold_before[InlineBulkStatus] = gate = trio.Event()
    async with in_background(other.chmod(fid, 0o600)):
        assert not mount.cell.valid(vnode)
        page[3] = ord("A")
        await mount.operations.write(handle, 0, bytes(page))
        gate.set()
        await settled()
        assert not mount.files.contents(vnode)._twins, "they are kept no longer than needed"
    await other.store(fid, b"B", 9)
    await mount.operations.fsync(handle, False)
    assert await other.fetch(fid) == page_with(at3="A", at9="B")


@pytest.mark.parametrize("when", ["before a break", "during a break", "while it was stored"])
async def test_a_page_that_the_kernel_has_without_having_read_it_undoes_nothing(
    world: World, mount: ClientMount, when: str
) -> None:
    """A write(2) of all of it made it. Its block was never fetched."""
    other, fid = await new_file(world, b"-" * 2 * PAGE_BYTES)
    vnode = await mount.open(b"file")
    handle = await mount.open_handle(vnode, os.O_RDWR)
    await mount.operations.write(handle, 0, page_with())
    if when == "while it was stored":
        mount.session.hold_after[StoreData] = gate = trio.Event()
        async with in_background(mount.operations.fsync(handle, False)) as fsync:
            await mount.operations.write(handle, 0, page_with(at3="A"))
            gate.set()
            await other.store(fid, b"B", 9)
            with trio.fail_after(20):
                while not fsync.done:
                    await settled()
    else:
        await mount.operations.fsync(handle, False)
        if when == "before a break":
            await mount.operations.write(handle, 0, page_with(at3="A"))
            await other.store(fid, b"B", 9)
        else:
            mount.kernel.drops_end = trio.Event()
            async with in_background(other.store(fid, b"B", 9)):
                await mount.operations.write(handle, 0, page_with(at3="A"))
                mount.kernel.drops_end.set()
                await settled()
    await mount.operations.fsync(handle, False)
    assert (await other.fetch(fid))[:PAGE_BYTES] == page_with(at3="A", at9="B")


async def test_with_the_extension_equal_bytes_that_were_written_count(world: World, mount: ClientMount) -> None:
    """Else a whole page written by write(2) during a break looks as if a mapping had been written back."""
    other, fid = await new_file(world, b"o" * PAGE_BYTES)
    vnode = await mount.open(b"file")
    handle = await mount.open_handle(vnode, os.O_RDWR)
    await mount.operations.read(handle, 0, PAGE_BYTES)
    mount.kernel.drops_end = trio.Event()
    async with in_background(other.store(fid, b"B", 9)):
        with handling(Request(from_page_cache=False)):
            await mount.operations.write(handle, 0, page_with(at3="A"))
        mount.kernel.drops_end.set()
        await settled()
    await mount.operations.fsync(handle, False)
    assert await other.fetch(fid) == page_with(at3="A")


async def test_with_the_extension_pages_written_back_need_no_promise(world: World, mount: ClientMount) -> None:
    """They may come when a lease has just ended; what equals the base was not written."""
    other, fid = await new_file(world, b"o" * PAGE_BYTES)
    vnode = await mount.open(b"file")
    handle = await mount.open_handle(vnode, os.O_RDWR)
    await mount.operations.read(handle, 0, PAGE_BYTES)
    vnode.promise_until = 0.0
    with handling(Request(from_page_cache=True)):
        await mount.operations.write(handle, 0, page_with(at3="A"))
    await other.store(fid, b"B", 9)
    await mount.operations.fsync(handle, False)
    assert await other.fetch(fid) == page_with(at3="A", at9="B")


async def test_a_page_of_which_nothing_is_left_to_store_leaves_no_mark_of_dirtiness(
    world: World, mount: ClientMount
) -> None:
    other, fid = await new_file(world, b"o" * PAGE_BYTES)
    vnode = await mount.open(b"file")
    handle = await mount.open_handle(vnode, os.O_RDWR)
    await mount.operations.write(handle, 0, bytes(await mount.operations.read(handle, 0, PAGE_BYTES)))
    await other.store(fid, b"B", 9)
    assert not vnode.is_dirty
    await mount.operations.flush(handle)
    assert vnode.pending_mtime_ns is None
    assert await other.fetch(fid) == page_with(at9="B")


async def test_stores_of_ones_own_do_not_make_ones_pages_refused(world: World, mount: ClientMount) -> None:
    other, fid, vnode, handle = await written_back_page(world, mount)
    for step in range(3):
        await mount.operations.fsync(handle, False)
        await mount.operations.write(handle, 5, b"%d" % step)
        await mount.operations.fsync(handle, False)
        if step == 1:
            await mount.files.truncate(vnode, size_to(fid, 2 * PAGE_BYTES))
        page = bytearray(await mount.operations.read(handle, 0, PAGE_BYTES))
        page[7] = step
        await mount.operations.write(handle, 0, bytes(page))
    await mount.operations.fsync(handle, False)
    assert (await other.fetch(fid))[:8] == b"oooAo2o" + bytes([2])
    assert len([call for call in mount.session.sent_of(StoreData) if call.since]) == 4
    assert len(mount.session.sent_of(StoreData)) == 7


async def test_a_file_that_no_mapping_can_write_pays_nothing_for_it(world: World, mount: ClientMount) -> None:
    await new_file(world, b"o" * PAGE_BYTES)
    vnode = await mount.open(b"file")
    handle = await mount.open_handle(vnode, os.O_WRONLY)
    await mount.read(vnode)
    await mount.operations.write(handle, 0, page_with(at3="A"))
    await mount.operations.fsync(handle, False)
    assert [call.since for call in mount.session.sent_of(StoreData)] == [None]


def page_with(**changed: str) -> bytes:
    page = bytearray(b"o" * PAGE_BYTES)
    for name, letter in changed.items():
        page[int(name.removeprefix("at"))] = ord(letter)
    return bytes(page)


# Appending


async def test_appenders_on_two_mounts_lose_nothing(world: World, mount: ClientMount) -> None:
    """Their kernels write where they believe that the file ends."""
    await new_file(world, b"")
    second = await world.mount()
    mounts = [mount, second]
    vnodes = [await m.open(b"file") for m in mounts]
    handles = [await m.open_handle(vnode, os.O_WRONLY | os.O_APPEND) for m, vnode in zip(mounts, vnodes, strict=True)]

    async def appender(n: int) -> None:
        end = 0
        for step in range(20):
            line = b"%d:%02d\n" % (n, step)
            await mounts[n].operations.write(handles[n], end, line)
            end += len(line)
        await mounts[n].operations.fsync(handles[n], False)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(appender, 0)
        nursery.start_soon(appender, 1)
    content = await mount.read(vnodes[0])
    assert content == await second.read(vnodes[1])
    lines = content.split()
    for n in range(2):
        assert [line for line in lines if line.startswith(b"%d" % n)] == [b"%d:%02d" % (n, step) for step in range(20)]
    assert len(lines) == 40


async def test_what_was_appended_alone_can_be_read_without_asking(world: World, mount: ClientMount) -> None:
    await new_file(world, b"abc")
    vnode = await mount.open(b"file")
    handle = await mount.open_handle(vnode, os.O_RDWR | os.O_APPEND)
    assert await mount.read(vnode) == b"abc"
    before = mount.drops_of_pages(vnode)
    await mount.operations.write(handle, 3, b"def")
    await mount.operations.write(handle, 6, b"ghi")
    asked = len(mount.session.sent)
    assert await mount.read(vnode) == b"abcdefghi"
    assert len(mount.session.sent) == asked
    assert mount.drops_of_pages(vnode) == before


async def test_an_append_goes_behind_what_is_not_stored_yet(world: World, mount: ClientMount) -> None:
    other, fid = await new_file(world, b"abc")
    vnode = await mount.open(b"file")
    handle = await mount.open_handle(vnode, os.O_RDWR | os.O_APPEND)
    await mount.files.write(vnode, 5, b"far")
    await mount.operations.write(handle, 8, b"end")
    assert await other.fetch(fid) == b"abc\0\0farend"
    await mount.operations.release(handle)


async def test_a_close_after_an_append_waits_until_others_know(world: World, mount: ClientMount) -> None:
    other, fid = await new_file(world, b"abc")
    await other.stat(fid)
    vnode = await mount.open(b"file")
    handle = await mount.open_handle(vnode, os.O_WRONLY | os.O_APPEND)
    other.acknowledge = trio.Event()
    with trio.fail_after(5):
        await mount.operations.write(handle, 3, b"def")
    async with (
        in_background(mount.operations.flush(handle)) as flush,
        in_background(mount.operations.flush(handle)) as too,
    ):
        assert not flush.done and not too.done
        other.acknowledge.set()
        await settled()
        assert flush.done and flush.error is None and too.done
    await mount.operations.flush(handle)
    assert [(call.durable, call.seen) for call in mount.session.sent_of(Sync)] == [(False, True)] * 2
