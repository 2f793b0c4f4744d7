"""Rules of the vnode table, without I/O. Times are seconds of a clock that the tests turn."""

from __future__ import annotations

import pytest
from promisefs_client.data.contents import FileContents, PageCache
from promisefs_client.network.servers import MAX_REMEMBERED_BREAKS, CallMark, Server
from promisefs_client.vnodes.vnode import ROOT_INO, Vnode, ino_of
from promisefs_client.vnodes.vnode_table import PROMISE_MARGIN_S, KernelWork, VnodeTable
from promisefs_client.vnodes.volumes import Volumes
from promisefs_protocol.ids import Fid, PromisedStatus, Status
from promisefs_protocol.messages import Break, Changed

ROOT = Fid(1, 1, 1)
FILE = Fid(1, 2, 7)
OTHER = Fid(1, 3, 7)
REGULAR, DIRECTORY = 0o100644, 0o040755


def status(mode: int = REGULAR, *, version: int = 1, ctime: int = 1, size: int = 0, incarnation: int = 1) -> Status:
    return Status(mode, 0, 0, 1, size, size, version, incarnation, 0, 0, ctime, 0)


def promised(fid: Fid, what: Status, promise_s: int = 1000) -> PromisedStatus:
    return PromisedStatus(fid, what, promise_s)


@pytest.fixture
def server() -> Server:
    made = Server("alpha")
    made.lease_until = 1e9
    return made


@pytest.fixture
def table(server: Server) -> VnodeTable:
    volumes = Volumes()
    mounted = volumes.learn(1, "root", ROOT, server)
    made = VnodeTable(PageCache(1 << 20), volumes, mounted, status(DIRECTORY), max_idle=100)
    made.names_can_be_dropped = True
    return made


def begin_call(table: VnodeTable, volume: int = 1) -> CallMark:
    return table.volumes[volume].server.begin_call(0.0)


def install(table: VnodeTable, entry: PromisedStatus, now: float = 0.0) -> Vnode:
    server = table.volumes[entry.fid.volume].server
    mark = server.begin_call(now)
    try:
        return table.install(entry, mark)
    finally:
        server.end_call(mark)


def break_promises(table: VnodeTable, *breaks: Break) -> tuple[list[KernelWork], list[Fid]]:
    return table.break_promises(table.volumes[breaks[0].fid.volume].server, breaks)


def break_data(fid: Fid, version: int = 2, size: int = 0) -> Break:
    return Break(fid, Changed.DATA | Changed.STATUS, version, size)


def test_a_promise_counts_from_when_the_call_was_sent_and_its_last_seconds_are_not_used(table: VnodeTable) -> None:
    vnode = install(table, promised(FILE, status(), 100), now=50.0)
    assert table.valid(vnode, 50.0 + 100 - PROMISE_MARGIN_S - 0.1)
    assert not table.valid(vnode, 50.0 + 100 - PROMISE_MARGIN_S)


def test_without_a_promise_nothing_is_valid_and_the_kernel_may_keep_nothing(table: VnodeTable) -> None:
    vnode = install(table, promised(FILE, status(), 0))
    assert not table.valid(vnode, 0.0)
    assert table.remaining_s(vnode, 0.0) == 0.0


def test_no_promise_is_worth_anything_after_the_lease(table: VnodeTable) -> None:
    vnode = install(table, promised(FILE, status()))
    vnode.server.lease_until = 15.0
    assert table.valid(vnode, 14.9)
    assert not table.valid(vnode, 15.0)
    assert table.remaining_s(vnode, 15.0) == 0.0


def test_a_promise_broken_while_its_reply_was_under_way_is_not_installed_but_the_status_is(table: VnodeTable) -> None:
    install(table, promised(FILE, status(size=1)))
    mark = begin_call(table)
    break_promises(table, break_data(FILE))
    vnode = table.install(promised(FILE, status(version=2, ctime=2, size=5)), mark)
    assert vnode.status.size == 5
    assert not table.valid(vnode, 0.0)


def test_a_break_for_a_fid_that_is_not_known_yet_counts(table: VnodeTable) -> None:
    mark = begin_call(table)
    assert break_promises(table, break_data(FILE)) == ([], [])
    assert not table.valid(table.install(promised(FILE, status()), mark), 0.0)


def test_a_break_of_another_fid_does_not_cost_the_promise(table: VnodeTable) -> None:
    mark = begin_call(table)
    break_promises(table, break_data(OTHER))
    assert table.valid(table.install(promised(FILE, status()), mark), 0.0)


def test_a_break_from_before_the_call_does_not_count(table: VnodeTable) -> None:
    other = begin_call(table)
    break_promises(table, break_data(FILE))
    assert table.valid(install(table, promised(FILE, status())), 0.0)
    other.server.end_call(other)


def test_a_reset_voids_promises_of_calls_in_flight(table: VnodeTable) -> None:
    mark = begin_call(table)
    table.reset(table.volumes[1].server)
    assert not table.valid(table.install(promised(FILE, status()), mark), 0.0)
    assert not table.valid(install(table, promised(FILE, status())), 0.0), "nobody has said where the volume is"
    table.volumes.learn(1, "root", ROOT, mark.server)
    assert table.valid(install(table, promised(FILE, status())), 0.0)


def test_an_older_status_that_comes_late_changes_nothing(table: VnodeTable) -> None:
    late: CallMark = begin_call(table)
    vnode = install(table, promised(FILE, status(version=3, ctime=30, size=9)))
    table.install(promised(FILE, status(version=2, ctime=20, size=4)), late)
    assert (vnode.status.size, vnode.status.data_version) == (9, 3)


def test_after_an_unclean_start_an_earlier_ctime_is_taken(table: VnodeTable) -> None:
    vnode = install(table, promised(FILE, status(version=3, ctime=30)))
    install(table, promised(FILE, status(version=2, ctime=20, incarnation=2)))
    assert vnode.status.version == (2, 2)


def file_with_block(table: VnodeTable, *, version: int = 1, ctime: int = 1) -> tuple[Vnode, FileContents]:
    vnode = install(table, promised(FILE, status(version=version, ctime=ctime, size=4)))
    contents = vnode.contents = FileContents(table.cache)
    contents.set_version(vnode.status.version, 4)
    assert contents.fill(0, b"data", contents.fill_epoch, vnode.status.version)
    return vnode, contents


def test_an_equal_version_keeps_the_pages(table: VnodeTable) -> None:
    vnode, contents = file_with_block(table)
    break_promises(table, Break(FILE, Changed.STATUS, 1, 4))
    assert not table.valid(vnode, 0.0)
    install(table, promised(FILE, status(ctime=2, size=4)))
    assert contents.read(0, 4, 4) == b"data"
    assert not table.found_stale


def test_another_version_drops_the_pages_here_and_in_the_kernel(table: VnodeTable) -> None:
    vnode, contents = file_with_block(table)
    vnode.kernel_pages = True
    install(table, promised(FILE, status(version=5, ctime=5, size=4)))
    assert contents.read(0, 4, 4) is None
    assert [item.ino for item in table.found_stale if item.pages] == [vnode.ino]


def test_a_break_of_data_drops_the_pages_at_once_and_keeps_what_is_dirty(table: VnodeTable) -> None:
    vnode, contents = file_with_block(table)
    contents.write(1, b"X")
    table.add_lookup(vnode)
    vnode.kernel_pages = True
    work, _ = break_promises(table, break_data(FILE))
    assert contents.read(0, 4, 4) is None
    assert contents.dirty_bytes == 1
    assert [item.pages for item in work] == [True]


def test_an_own_store_keeps_the_pages_under_the_next_version(table: VnodeTable) -> None:
    vnode, contents = file_with_block(table)
    mark = begin_call(table)
    table.install_own_data(promised(FILE, status(version=2, ctime=2, size=4)), mark)
    table.stores_done(vnode)
    assert contents.read(0, 4, 4) == b"data"
    assert contents.version == (1, 2)


def test_replies_of_own_stores_may_come_in_any_order(table: VnodeTable) -> None:
    vnode, contents = file_with_block(table)
    mark = begin_call(table)
    for version in (3, 4, 2):
        table.install_own_data(promised(FILE, status(version=version, ctime=version, size=4)), mark)
    table.stores_done(vnode)
    assert contents.version == (1, 4)
    assert contents.read(0, 4, 4) == b"data"


def test_a_version_that_is_not_ours_between_our_stores_costs_the_pages(table: VnodeTable) -> None:
    vnode, contents = file_with_block(table)
    mark = begin_call(table)
    table.install_own_data(promised(FILE, status(version=2, ctime=2, size=4)), mark)
    table.install_own_data(promised(FILE, status(version=4, ctime=4, size=4)), mark)
    table.stores_done(vnode)
    assert contents.read(0, 4, 4) is None
    assert contents.version == (1, 4)


def directory_with(table: VnodeTable, names: dict[bytes, Fid | None]) -> Vnode:
    directory = install(table, promised(ROOT, status(DIRECTORY, version=1, ctime=1)))
    table.learn_listing(directory, directory.status.version, names)
    return directory


def test_an_own_change_edits_the_names_if_it_made_the_next_version(table: VnodeTable) -> None:
    directory = directory_with(table, {b"a": FILE})
    mark = begin_call(table)
    table.own_change(promised(ROOT, status(DIRECTORY, version=2, ctime=2)), mark, {b"b": OTHER})
    assert directory.names is not None and directory.names.complete
    assert directory.names.entries == {b"a": FILE, b"b": OTHER}


def test_an_own_change_that_skips_a_version_drops_the_names(table: VnodeTable) -> None:
    directory = directory_with(table, {b"a": FILE})
    mark = begin_call(table)
    table.own_change(promised(ROOT, status(DIRECTORY, version=3, ctime=3)), mark, {b"b": OTHER})
    assert directory.names is None or not directory.names.complete
    assert directory.names is None or b"a" not in directory.names.entries


def test_a_name_of_an_older_version_of_the_directory_is_not_learnt_nor_given_time(table: VnodeTable) -> None:
    directory = install(table, promised(ROOT, status(DIRECTORY, version=5, ctime=5)))
    table.learn_name(directory, (1, 4), b"a", FILE)
    assert table.name_remaining_s(directory, b"a", FILE, 0.0) == 0.0
    table.learn_name(directory, (1, 5), b"a", FILE)
    assert table.name_remaining_s(directory, b"a", FILE, 0.0) > 0.0
    assert table.name_remaining_s(directory, b"a", None, 0.0) == 0.0


def test_a_break_of_a_directory_drops_its_names(table: VnodeTable) -> None:
    directory = directory_with(table, {b"a": FILE})
    work, _ = break_promises(table, break_data(ROOT))
    assert directory.names is None
    assert [item.names for item in work] == [True]


def test_a_deleted_file_that_is_open_is_reported_and_told_to_the_kernel(table: VnodeTable) -> None:
    vnode = table.add_open(table.add_lookup(install(table, promised(FILE, status()))))
    _, still_open = break_promises(table, Break(FILE, Changed.DELETED | Changed.STATUS, 1, 0))
    assert still_open == [FILE]
    assert vnode.deleted


def test_growth_elsewhere_is_reported_for_open_files_only(table: VnodeTable) -> None:
    vnode = table.add_lookup(install(table, promised(FILE, status(size=4))))
    assert [w.grown_to for w in break_promises(table, break_data(FILE, size=9))[0]] == [0]
    table.add_open(vnode)
    assert [w.grown_to for w in break_promises(table, break_data(FILE, size=9))[0]] == [9]


def test_a_reset_does_open_files_first(table: VnodeTable) -> None:
    opened = table.add_open(table.add_lookup(install(table, promised(FILE, status()))))
    opened.kernel_pages = True
    known = table.add_lookup(install(table, promised(OTHER, status())))
    urgent, rest = table.reset(table.volumes[1].server)
    assert [(w.ino, w.pages) for w in urgent] == [(opened.ino, True)]
    assert known.ino in [w.ino for w in rest]
    assert not table.valid(opened, 0.0) and not table.valid(known, 0.0)


def test_a_reset_does_what_only_a_mapping_keeps_open_first(table: VnodeTable) -> None:
    fids = [Fid(1, number, 7) for number in range(10, 14)]
    opened = [table.add_open(table.add_lookup(install(table, promised(fid, status())))) for fid in fids]
    for handle, vnode in enumerate(opened[:3]):
        table.open_mmaps.opened(vnode, handle)
    table.open_mmaps.flushed(opened[2], 2, now=1.0)
    urgent, rest = table.reset(table.volumes[1].server)
    assert [item.ino for item in urgent] == [opened[n].ino for n in (2, 0, 1, 3)]
    assert [item.ino for item in rest] == [ROOT_INO]


def test_idle_vnodes_are_evicted_least_recently_used_first_and_given_up(table: VnodeTable) -> None:
    vnodes = [install(table, promised(Fid(1, 10 + n, 1), status())) for n in range(120)]
    used = table.add_lookup(vnodes[119])
    assert table.get(vnodes[0].fid) is None
    assert table.get(used.fid) is used
    assert vnodes[0].fid in used.server.given_up
    table.check_invariants()


def test_what_the_kernel_refers_to_stays_until_it_is_forgotten(table: VnodeTable) -> None:
    vnode = table.add_lookup(table.add_lookup(install(table, promised(FILE, status()))))
    for n in range(200):
        install(table, promised(Fid(1, 10 + n, 1), status()))
    assert table.get(FILE) is vnode
    table.forget(vnode.ino, 2)
    for n in range(200):
        install(table, promised(Fid(1, 300 + n, 1), status()))
    assert table.get(FILE) is None


def test_a_kernel_that_forgets_more_than_it_was_told_ends_nothing(table: VnodeTable) -> None:
    vnode = table.add_lookup(install(table, promised(FILE, status())))
    assert not table.forget(vnode.ino, 2)
    assert vnode.lookups == 0
    assert table.forget(vnode.ino + 1, 5), "not known any more"
    table.check_invariants()


def test_a_vnode_evicted_while_a_task_held_it_is_put_back(table: VnodeTable) -> None:
    vnode = install(table, promised(FILE, status()))
    for n in range(200):
        install(table, promised(Fid(1, 10 + n, 1), status()))
    assert table.get(FILE) is None
    assert table.add_lookup(vnode) is vnode
    assert table.by_ino(vnode.ino) is vnode
    assert not table.valid(vnode, 0.0)
    table.check_invariants()


def test_inode_numbers_follow_from_fids(table: VnodeTable) -> None:
    assert install(table, promised(FILE, status())).ino == ino_of(FILE) == (1 << 40) + 2
    root = table.get(ROOT)
    assert root is not None and root.ino == ROOT_INO


def test_a_file_that_may_be_mapped_needs_a_promise_again_after_a_break(table: VnodeTable) -> None:
    vnode = table.add_open(table.add_lookup(install(table, promised(FILE, status()))))
    vnode.kernel_pages = True
    assert [w.renew for w in break_promises(table, Break(FILE, Changed.STATUS, 1, 0))[0]] == [True]
    assert [w.renew for w in break_promises(table, break_data(FILE))[0]] == [True]
    table.drop_open(vnode)
    assert [w.renew for w in break_promises(table, Break(FILE, Changed.STATUS, 1, 0))[0]] == [False]


def test_no_promise_is_installed_while_the_fid_is_being_given_up(server: Server, table: VnodeTable) -> None:
    server.given_up.append(FILE)
    before = begin_call(table)
    fids = server.begin_giving_up(10, known=table)
    assert fids == (FILE,)
    assert not table.valid(install(table, promised(FILE, status())), 0.0)
    during = begin_call(table)
    server.end_giving_up(fids)
    assert not table.valid(table.install(promised(FILE, status()), before), 0.0)
    assert not table.valid(table.install(promised(FILE, status()), during), 0.0)
    assert table.valid(install(table, promised(FILE, status())), 0.0)


def test_what_is_known_again_is_not_given_up(server: Server, table: VnodeTable) -> None:
    server.given_up.append(FILE)
    install(table, promised(FILE, status()))
    assert server.begin_giving_up(10, known=table) == ()


def test_a_break_of_an_unknown_file_during_a_creation_claims_it(table: VnodeTable) -> None:
    deleted = Break(FILE, Changed.DELETED | Changed.STATUS, 1, 0)
    assert break_promises(table, deleted)[1] == []
    table.begin_create()
    assert break_promises(table, deleted, Break(OTHER, Changed.DELETED, 1, 0))[1] == [FILE, OTHER]
    created = install(table, promised(FILE, status()))
    assert table.end_create(created) == [OTHER]
    assert created.deleted and created.kept


def test_a_break_in_a_volume_that_is_not_known_claims_nothing(server: Server, table: VnodeTable) -> None:
    """Nothing is created there; and nobody could be told that it is not open after all."""
    table.begin_create()
    deleted = Break(Fid(2, 2, 7), Changed.DELETED, 1, 0)
    assert table.break_promises(server, [deleted])[1] == []
    assert table.end_create(None) == []


def test_the_kernel_may_keep_no_name_that_it_could_not_be_made_to_forget(table: VnodeTable) -> None:
    directory = directory_with(table, {b"a": FILE})
    assert table.name_remaining_s(directory, b"a", FILE, 0.0) > 0.0
    table.names_can_be_dropped = False
    assert table.name_remaining_s(directory, b"a", FILE, 0.0) == 0.0
    assert table.name_remaining_s(directory, b"absent", None, 0.0) == 0.0


def test_an_own_store_after_an_unseen_change_of_anothers_costs_the_pages(table: VnodeTable) -> None:
    """Without a promise nobody told us of version 2, which another mount made before our store made version 3."""
    _, contents = file_with_block(table)
    table.reset(table.volumes[1].server)
    mark = begin_call(table)
    table.install_own_data(promised(FILE, status(version=3, ctime=3, size=4)), mark)
    assert contents.read(0, 4, 4) is None
    assert contents.version == (1, 3)


def test_a_change_of_anothers_after_a_reset_costs_the_pages_though_own_stores_are_under_way(table: VnodeTable) -> None:
    """The reply of version 3 came before that of version 2, which is repeated after the server was away."""
    vnode, contents = file_with_block(table)
    table.install_own_data(promised(FILE, status(version=3, ctime=3, size=4)), begin_call(table))
    table.reset(table.volumes[1].server)
    table.volumes.confirm(table.volumes[1], begin_call(table))
    install(table, promised(FILE, status(version=7, ctime=7, size=4)))
    assert table.valid(vnode, 0.0)
    assert contents.read(0, 4, 4) is None
    assert contents.version == (1, 7)


def test_when_too_many_breaks_are_to_be_remembered_all_calls_in_flight_lose_their_promises(table: VnodeTable) -> None:
    mark = begin_call(table)
    break_promises(table, *(break_data(Fid(1, 100 + n, 1)) for n in range(MAX_REMEMBERED_BREAKS + 1)))
    assert not table.valid(table.install(promised(FILE, status()), mark), 0.0)
    assert table.valid(install(table, promised(FILE, status())), 0.0)


# Several servers

ELSEWHERE = Fid(1 << 16 | 1, 2, 7)


@pytest.fixture
def other(table: VnodeTable) -> Server:
    """Another server, with a volume of its own."""
    made = Server("beta")
    made.lease_until = 1e9
    table.volumes.learn(ELSEWHERE.volume, "other", ELSEWHERE._replace(vnode=1), made)
    return made


def test_a_reset_concerns_one_server_only(server: Server, other: Server, table: VnodeTable) -> None:
    vnodes = [table.add_open(table.add_lookup(install(table, promised(fid, status())))) for fid in (FILE, ELSEWHERE)]
    mine, theirs = vnodes
    calls = server.begin_call(0.0), other.begin_call(0.0)
    urgent, rest = table.reset(other)
    assert [item.ino for item in urgent + rest] == [theirs.ino]
    assert table.valid(mine, 0.0) and not table.valid(theirs, 0.0)
    for vnode, mark, may_have_it in zip(vnodes, calls, (True, False), strict=True):
        vnode.promise_until = 0.0
        table.install(promised(vnode.fid, status()), mark)
        assert table.valid(vnode, 0.0) is may_have_it


def test_a_lease_that_ran_out_concerns_one_server_only(other: Server, table: VnodeTable) -> None:
    mine, theirs = (install(table, promised(fid, status())) for fid in (FILE, ELSEWHERE))
    other.lease_until = 5.0
    assert table.valid(mine, 6.0) and not table.valid(theirs, 6.0)
    assert table.remaining_s(mine, 6.0) > 0.0 and table.remaining_s(theirs, 6.0) == 0.0


def test_a_server_breaks_and_makes_no_promise_on_another_ones_files(
    server: Server, other: Server, table: VnodeTable
) -> None:
    vnode = install(table, promised(FILE, status()))
    assert table.break_promises(other, [break_data(FILE)]) == ([], [])
    assert table.valid(vnode, 0.0)
    table.reset(server)
    table.install(promised(FILE, status()), other.begin_call(0.0))
    assert not table.valid(vnode, 0.0)


def test_inode_numbers_of_volumes_are_distinct(other: Server, table: VnodeTable) -> None:
    fids = [ROOT, FILE, ELSEWHERE._replace(vnode=1), ELSEWHERE]
    assert len({install(table, promised(fid, status(DIRECTORY))).ino for fid in fids}) == 4
