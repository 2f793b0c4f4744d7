"""`promisefsd volume ...` with a server that runs and without one, and two servers with one cell file."""

from __future__ import annotations

import json
import signal
import socket
from pathlib import Path

import pytest
import trio
from promisefs_protocol.abort import AbortCode, Aborted
from promisefs_protocol.messages import FetchStatus, GetEntryByID, GetEntryByName
from server_cell import settled
from server_daemon import client_of, daemon
from volume_commands import run, run_and_die


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def write_cell(path: Path, ports: list[int]) -> None:
    servers = [f'[[server]]\nnumber = {i}\naddress = "127.0.0.1:{port}"\n' for i, port in enumerate(ports)]
    path.write_text('name = "example.org"\n' + "".join(servers))


def listed(folder: Path) -> dict[str, list[str]]:
    """What `volume list` prints: by name the other columns."""
    status, stdout, stderr = run("volume", "list", str(folder))
    assert (status, stderr) == (0, "")
    header, *lines = [line.split() for line in stdout.splitlines()]
    assert header == ["name", "number", "files", "size", "where"]
    return {line[0]: line[1:] for line in lines}


@pytest.fixture(params=["running", "stopped"])
def store(request: pytest.FixtureRequest, folder: Path) -> object:
    """A store with or without its server."""
    with daemon(folder) as server:
        if request.param == "running":
            yield folder
            return
        server.end(signal.SIGTERM)
    yield folder


def test_a_volumes_life(store: Path) -> None:
    assert run("volume", "create", str(store), "a") == (0, "made volume a, number 2\n", "")
    assert run("volume", "create", str(store), "b") == (0, "made volume b, number 3\n", "")
    assert run("volume", "rename", str(store), "b", "c") == (0, "renamed volume b to c\n", "")
    assert run("volume", "remove", str(store), "a", "--yes") == (0, "removed volume a\n", "")
    assert {name: row[0] for name, row in listed(store).items()} == {"root": "1", "c": "3"}
    assert run("volume", "create", str(store), "a")[1] == "made volume a, number 4\n"


def test_one_line_and_an_exit_code_for_what_is_refused(store: Path) -> None:
    assert run("volume", "create", str(store), "a")[0] == 0
    before = listed(store)
    for arguments, words in (
        (("create", "a"), "there is a volume 'a' already"),
        (("create", "a b"), "'a b': a name has"),
        (("create", "root"), "the root volume"),
        (("rename", "none", "b"), "no volume 'none' here"),
        (("rename", "a", "root"), "the root volume"),
        (("rename", "root", "b"), "the root volume cannot be renamed"),
        (("remove", "none", "--yes"), "no volume 'none' here"),
        (("remove", "none"), "no volume 'none' here"),
        (("remove", "root", "--yes"), "the root volume cannot be removed"),
    ):
        status, stdout, stderr = run("volume", arguments[0], str(store), *arguments[1:])
        assert (status, stdout, stderr.count("\n"), words in stderr) == (5, "", 1, True), (arguments, stderr)
    status, _, stderr = run("volume", "remove", str(store), "a")
    assert status == 2 and "say --yes" in stderr
    assert listed(store) == before


def test_folders_that_are_no_stores(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("mine")
    (tmp_path / "zero").mkdir()
    (tmp_path / "zero" / "store.sqlite").touch()
    for name in ("none", "empty", "file", "zero"):
        for command in (("list",), ("create", "a"), ("remove", "a", "--yes"), ("rename", "a", "b")):
            status, _, stderr = run("volume", command[0], str(tmp_path / name), *command[1:])
            assert (status, stderr.count("\n"), "is no promisefs store" in stderr) == (3, 1, True), stderr
    assert not (tmp_path / "none").exists() and not list((tmp_path / "empty").iterdir())
    assert (tmp_path / "zero" / "store.sqlite").stat().st_size == 0


def test_help_has_examples() -> None:
    for command in ("create", "list", "remove", "rename", "move"):
        status, stdout, _ = run("volume", command, "-h")
        assert status == 0 and "Example" in stdout and "Exit codes" in stdout


def test_a_move_needs_both_servers_to_be_stopped(store: Path, tmp_path: Path) -> None:
    status, _, stderr = run("volume", "move", str(store), "root", str(store))
    assert status == 5 and "are the same" in stderr
    with daemon(tmp_path / "other"):
        status, _, stderr = run("volume", "move", str(store), "root", str(tmp_path / "other"))
        assert status == 3 and "stop it first" in stderr and stderr.count("\n") == 1


async def test_promises_survive_a_volume_made_while_the_server_was_stopped(folder: Path) -> None:
    with daemon(folder) as server:
        async with client_of(server) as a:
            uuid = a.uuid
            server.end(signal.SIGTERM)
    assert run("volume", "create", str(folder), "a")[0] == 0
    assert set(listed(folder)) == {"root", "a"}
    with daemon(folder) as server:
        async with client_of(server, uuid) as a:
            assert a.inits == 0
            assert (await a.call(GetEntryByName("a"))).volume == 2


@pytest.mark.parametrize("command", [("rename", "a", "b"), ("remove", "a", "--yes")])
async def test_what_changed_while_the_server_was_stopped_is_told_at_its_start(
    folder: Path, command: tuple[str, ...]
) -> None:
    with daemon(folder, "--lease", "1") as server:
        assert run("volume", "create", str(folder), "a")[0] == 0
        async with client_of(server) as a:
            await a.call(GetEntryByName("a"))
            uuid = a.uuid
            server.end(signal.SIGTERM)
    status, _, stderr = run("volume", command[0], str(folder), *command[1:])
    assert status == 0 and "until the leases of 1 clients" in stderr
    with daemon(folder, "--lease", "1") as server:
        async with client_of(server, uuid) as a:
            assert a.inits == 1
            with pytest.raises(Aborted) as refusal:
                await a.call(GetEntryByName("a"))
            assert refusal.value.code == AbortCode.VNOVOL


async def test_kill_9_in_the_middle_of_a_removal(folder: Path) -> None:
    """Of the command, then of the server: it is removed or not, and what is left goes at the next start."""
    with daemon(folder, "--lease", "0.5") as server:
        assert run("volume", "create", str(folder), "a")[0] == 0
        async with client_of(server) as a:
            root = (await a.call(GetEntryByName("a"))).root
            for i in range(30):
                await a.store((await a.create(b"%d" % i, root)).fid, b"x")
            kept = await a.create(b"kept")
            await a.store(kept.fid, b"kept")
        server.end(signal.SIGTERM)
    data = folder / "data" / "2"
    remove = "volume", "remove", str(folder), "a", "--yes"
    assert run_and_die("promises.callback_state", "forget", 1, *remove)
    assert set(listed(folder)) == {"root", "a"} and len(list(data.rglob("*"))) == 31
    assert run_and_die("store.datafiles", "DataFiles.delete", 10, *remove)
    assert set(listed(folder)) == {"root"} and len(list(data.rglob("*"))) == 21
    # The server goes on with it, and is killed too.
    with daemon(folder, "--lease", "0.5") as server:
        server.end(signal.SIGKILL)
    with daemon(folder, "--lease", "0.5") as server:
        async with client_of(server) as a:
            for request in (FetchStatus(root), GetEntryByID(2)):
                with pytest.raises(Aborted) as refusal:
                    await a.call(request)
                assert refusal.value.code == AbortCode.VNOVOL
            with trio.fail_after(20):
                while data.exists():
                    await settled()
            assert await a.fetch(kept.fid) == b"kept"
        assert server.end(signal.SIGTERM)[0] == 0
    assert set(listed(folder)) == {"root"}


async def test_kill_9_of_the_server_that_removes(folder: Path) -> None:
    """What was answered is not undone."""
    with daemon(folder, "--lease", "0.5") as server:
        assert run("volume", "create", str(folder), "a")[0] == 0
        assert run("volume", "create", str(folder), "b")[0] == 0
        async with client_of(server) as a:
            root = (await a.call(GetEntryByName("a"))).root
            for i in range(200):
                await a.create(b"%d" % i, root)
            assert run("volume", "remove", str(folder), "a", "--yes")[0] == 0
            assert run("volume", "rename", str(folder), "b", "c")[0] == 0
            server.end(signal.SIGKILL)
    with daemon(folder, "--lease", "0.5"):
        assert set(listed(folder)) == {"root", "c"}


async def test_two_servers_of_one_cell(tmp_path: Path) -> None:
    cell = tmp_path / "cell.toml"
    ports = free_ports(2)
    write_cell(cell, ports)
    stores = [tmp_path / "alpha", tmp_path / "beta"]
    options = [("--cell", str(cell), "--number", str(i), "--lease", "1") for i in range(2)]
    with daemon(stores[0], *options[0]) as alpha, daemon(stores[1], *options[1]) as beta:
        assert [alpha.port, beta.port] == ports, "they listen where the file says"
        for store in stores:
            assert run("volume", "create", str(store), "same")[0] == 0
        assert {name: row[0] for name, row in listed(stores[0]).items()} == {"root": "1", "same": "2"}
        assert {name: row[0] for name, row in listed(stores[1]).items()} == {"same": "65537"}
        assert run("volume", "rename", str(stores[0]), "same", "projects")[0] == 0
        async with client_of(alpha) as a:
            root = (await a.call(GetEntryByName("projects"))).root
            f = await a.create(b"f", root)
            await a.store(f.fid, b"before", sync=True)
        for server in (alpha, beta):
            assert server.end(signal.SIGTERM)[0] == 0
    assert run("volume", "move", str(stores[0]), "projects", str(stores[1]))[0] == 0
    assert listed(stores[0])["projects"][-4:] == ["moved", "to", "server", "1"]
    with daemon(stores[0], *options[0]) as alpha, daemon(stores[1], *options[1]) as beta:
        async with client_of(alpha) as a:
            with pytest.raises(Aborted) as refusal:
                await a.stat(f.fid)
            assert refusal.value.code == AbortCode.VMOVED
        async with client_of(beta, volume="same") as b:
            assert (await b.call(GetEntryByName("projects"))).root == root
            assert await b.fetch(f.fid) == b"before"


def test_a_store_is_served_as_what_it_is(tmp_path: Path, folder: Path) -> None:
    cell = tmp_path / "cell.toml"
    write_cell(cell, free_ports(2))
    with daemon(folder, "--cell", str(cell), "--number", "1"):
        pass
    for options, code, words in (
        (("--cell", str(cell), "--number", "0"), 3, "belongs to server 1 of the cell 'example.org'"),
        (("--port", "0"), 3, "cannot be served as a server without a cell"),
        (("--cell", str(cell), "--number", "7"), 2, "has no server number 7"),
        (("--cell", str(tmp_path / "none"), "--number", "1"), 2, "cannot read the cell file"),
        (("--cell", str(cell)), 2, "go together"),
        (("--number", "1"), 2, "go together"),
    ):
        status, stdout, stderr = run("serve", str(folder), *options)
        assert (status, stdout, words in stderr) == (code, "", True), stderr
        assert "go together" in words or stderr.count("\n") == 1


def test_list_for_programs(store: Path) -> None:
    assert run("volume", "create", str(store), "projects")[0] == 0
    status, output, _ = run("volume", "list", str(store), "--json")
    listed = json.loads(output)
    assert status == 0 and [(v["name"], v["files"], v["size"]) for v in listed] == [("root", 1, 0), ("projects", 1, 0)]
