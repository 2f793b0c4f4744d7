"""What open files are called, by the names that directories cache."""

from __future__ import annotations

import pytest
from promisefs_client.control import open_files
from promisefs_client.control.open_files import known_paths, open_files_report
from promisefs_client.data.contents import PageCache
from promisefs_client.network.servers import Server
from promisefs_client.vnodes.vnode import Vnode
from promisefs_client.vnodes.vnode_table import VnodeTable
from promisefs_client.vnodes.volumes import Volumes
from promisefs_protocol.ids import Fid, PromisedStatus, Status

ROOT, OUTER, INNER, FILE = (Fid(1, number, 1) for number in range(1, 5))
REGULAR, DIRECTORY = 0o100644, 0o040755


def status(mode: int) -> Status:
    return Status(mode, 0, 0, 1, 0, 0, 1, 1, 0, 0, 1, 0)


class Tree:
    """/outer/inner/file, with whatever is taken away from what is known of it."""

    def __init__(self) -> None:
        self.server = Server("alpha")
        volumes = Volumes()
        mounted = volumes.learn(1, "root", ROOT, self.server)
        self.table = VnodeTable(PageCache(1 << 20), volumes, mounted, status(DIRECTORY), 100)
        root = self.table.get(ROOT)
        assert root is not None
        self.root = root
        self.outer = self.add(root, b"outer", OUTER, DIRECTORY)
        self.inner = self.add(self.outer, b"in\xffner", INNER, DIRECTORY)
        self.file = self.add(self.inner, b"file", FILE, REGULAR)

    def add(self, directory: Vnode, name: bytes, fid: Fid, mode: int) -> Vnode:
        mark = self.server.begin_call(0.0)
        vnode = self.table.install(PromisedStatus(fid, status(mode), 1000), mark)
        self.server.end_call(mark)
        self.table.learn_name(directory, directory.status.version, name, fid)
        if mode == DIRECTORY:
            vnode.parent = directory.fid
        return vnode

    @property
    def path(self) -> bytes:
        return known_paths(self.table, [self.file])[FILE]


def test_a_path_from_the_root_of_the_mount() -> None:
    assert Tree().path == b"/outer/in\xffner/file"


def test_what_is_not_known_of_a_path() -> None:
    tree = Tree()
    tree.outer.parent = None
    assert tree.path == b"?/in\xffner/file"
    tree.inner.parent = Fid(1, 99, 1)
    assert tree.path == b"?/file"
    tree.inner.names = None
    assert tree.path == b"?"


def test_names_that_go_round_in_a_circle() -> None:
    tree = Tree()
    tree.table.learn_name(tree.inner, tree.inner.status.version, b"outer", OUTER)
    tree.outer.parent = INNER
    assert tree.path.startswith(b"?/")


def test_more_than_can_be_listed_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    tree = Tree()
    tree.table.open_mmaps.opened(tree.file, 1)
    tree.table.open_mmaps.opened(tree.file, 2)
    tree.table.open_mmaps.opened(tree.inner, 3)
    report = open_files_report(tree.table, 0.0)
    assert [(file["fid"], file["opens"]) for file in report["files"]] == [(str(FILE), 2), (str(INNER), 1)]
    assert report["omitted"] == 0
    monkeypatch.setattr(open_files, "MAX_LISTED", 1)
    assert open_files_report(tree.table, 0.0)["omitted"] == 1
