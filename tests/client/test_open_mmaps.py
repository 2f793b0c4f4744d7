"""The registry of what may be mapped. Times are seconds of a clock that the tests turn."""

from __future__ import annotations

import pytest
from promisefs_client.network.servers import Server
from promisefs_client.vnodes.open_mmaps import SETTLED_S, OpenFile, OpenMmaps
from promisefs_client.vnodes.vnode import Vnode, ino_of
from promisefs_client.vnodes.volumes import Volume
from promisefs_protocol.ids import Fid, Status

SERVER = Server("alpha")
VOLUMES = {number: Volume(number, str(number), Fid(number, 1, 1), SERVER) for number in (1, 65537)}


def vnode_of(fid: Fid) -> Vnode:
    return Vnode(fid, VOLUMES[fid.volume], ino_of(fid), Status(0o100644, 0, 0, 1, 0, 0, 1, 1, 0, 0, 1, 0))


@pytest.fixture
def file() -> Vnode:
    return vnode_of(Fid(1, 2, 7))


def test_a_flush_that_no_release_follows_tells_of_a_mapping(file: Vnode) -> None:
    registry = OpenMmaps()
    registry.opened(file, 1)
    assert list(registry.files(0.0)) == [OpenFile(file, 1, False)]
    registry.flushed(file, 1, now=10.0)
    assert list(registry.files(10.0)) == [OpenFile(file, 1, False)], "the release may be on its way"
    assert list(registry.files(10.0 + SETTLED_S)) == [OpenFile(file, 1, True)]
    registry.released(file, 1)
    assert list(registry.files(99.0)) == []


def test_one_handle_that_was_not_closed_keeps_the_file_open(file: Vnode) -> None:
    registry = OpenMmaps()
    registry.opened(file, 1)
    registry.flushed(file, 1, now=0.0)
    registry.opened(file, 2)
    assert list(registry.files(99.0)) == [OpenFile(file, 2, False)]
    registry.released(file, 2)
    assert list(registry.files(99.0)) == [OpenFile(file, 1, True)]
    assert len(registry) == 1


def test_the_last_munmap_may_race_with_a_new_mapping(file: Vnode) -> None:
    """Opened anew before the old handle is released: one file, and it stays."""
    registry = OpenMmaps()
    registry.opened(file, 1)
    registry.flushed(file, 1, now=0.0)
    registry.opened(file, 2)
    registry.flushed(file, 2, now=1.0)
    registry.released(file, 1)
    assert list(registry.files(99.0)) == [OpenFile(file, 1, True)]


def test_files_of_volumes_those_that_outlive_a_close_first(file: Vnode) -> None:
    registry = OpenMmaps()
    mapped, elsewhere = vnode_of(Fid(1, 3, 7)), vnode_of(Fid(65537, 2, 7))
    for handle, vnode in enumerate((file, elsewhere, mapped)):
        registry.opened(vnode, handle)
    registry.flushed(mapped, 2, now=0.0)
    assert registry.of_volumes({VOLUMES[1]}) == [mapped, file]
    assert registry.of_volumes({VOLUMES[65537]}) == [elsewhere]
