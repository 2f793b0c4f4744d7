"""The command promisefsd: its ready line, its exit codes, and what kill -9 leaves behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from pathlib import Path

import pytest
import trio
from promisefs_protocol.messages import Sync
from server_daemon import COMMAND, TIMEOUT_S, client_of, daemon


def run(*arguments: str) -> tuple[int, str]:
    done = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=TIMEOUT_S)
    assert "Traceback" not in done.stderr
    return done.returncode, done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_ends_cleanly(folder: Path, number: int) -> None:
    with daemon(folder) as server:
        status, stderr = server.end(number)
    assert status == 0 and "Traceback" not in stderr
    assert sorted(p.name for p in folder.iterdir()) == [
        "callback-state",
        "data",
        "identity.sqlite",
        "lock",
        "store.sqlite",
    ]


def test_one_line_for_what_people_get_wrong(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thing").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "store.sqlite").write_bytes(b"no database" * 1000)
    with daemon(folder) as server:
        for arguments, code, words in (
            ([str(tmp_path / "no" / "such")], 3, "parent directory"),
            ([str(tmp_path / "full")], 3, "not empty"),
            ([str(tmp_path / "file")], 3, "not a directory"),
            ([str(tmp_path / "foreign")], 3, "damaged"),
            ([str(folder)], 3, "in use"),
            ([str(tmp_path / "new"), "--port", str(server.port)], 4, "in use"),
            ([str(tmp_path / "new"), "--listen", "0.0.0.0:0"], 4, "--insecure"),
            ([str(tmp_path / "new"), "--listen", "nosuch.invalid:0"], 4, "resolve"),
            ([str(tmp_path / "new"), "--listen", "127.0.0.1:x"], 2, "HOST:PORT"),
            ([str(tmp_path / "new"), "--lease", "0"], 2, "range"),
        ):
            status, stderr = run("serve", *(["--port", "0"] if code == 3 else []), *arguments)
            assert (status, words in stderr) == (code, True), (arguments, stderr)
            if code != 2:
                assert stderr.count("\n") == 1, stderr
        assert not (tmp_path / "new").exists()
        assert (tmp_path / "full" / "thing").read_text() == "mine"
        assert [p.name for p in (tmp_path / "full").iterdir()] == ["thing"]


@pytest.mark.parametrize("option", ["--help", "-h"])
def test_help_has_examples(option: str) -> None:
    done = subprocess.run([*COMMAND, "serve", option], capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 0 and "Examples" in done.stdout and "Exit codes" in done.stdout


async def test_ipv6_and_a_second_start(folder: Path) -> None:
    if not socket.has_ipv6:
        pytest.skip("no IPv6")
    with daemon(folder, "--listen", "[::1]:0") as server:
        async with client_of(server) as a:
            f = await a.create(b"f")
            await a.store(f.fid, b"kept")
            uuid = a.uuid
        assert server.end(signal.SIGTERM)[0] == 0
    with daemon(folder) as server:
        async with client_of(server, uuid) as a:
            assert a.inits == 0
            assert await a.fetch(f.fid) == b"kept"
            assert (await a.stat(f.fid)).status.incarnation == f.status.incarnation


async def test_kill_9_loses_nothing_that_was_answered(folder: Path) -> None:
    """Not even without sync: the kernel has it. Versions are those of a new incarnation."""
    with daemon(folder, "--lease", "1") as server:
        async with client_of(server) as a:
            d = await a.mkdir(b"d")
            contents = {}
            for i in range(30):
                f = await a.create(b"%d" % i, d.fid)
                contents[f.fid] = os.urandom(3000 * (i + 1))
                await a.store(f.fid, contents[f.fid])
                if i % 10 == 0:
                    await a.call(Sync((f.fid,)))
            await a.unlink(b"3", d.fid)
            versions = {fid: (await a.stat(fid)).status for fid in contents if fid.vnode != f.fid.vnode - 26}
            server.end(signal.SIGKILL)
    with daemon(folder, "--lease", "1") as server:
        async with client_of(server) as a:
            for fid, before in versions.items():
                after = (await a.stat(fid)).status
                assert after == before._replace(incarnation=before.incarnation + 1)
                assert await a.fetch(fid) == contents[fid]
            assert await a.lookup(b"3", d.fid) is None
            fresh = await a.create(b"new", d.fid)
            assert fresh.fid.vnode > max(fid.vnode for fid in contents)


async def test_kill_9_in_the_middle_of_stores(folder: Path) -> None:
    """Each block is wholly of one store that was sent; what was answered is not undone."""
    block = 1 << 20
    with daemon(folder, "--lease", "1") as server:
        async with client_of(server) as a:
            f = await a.create(b"f")
            await a.store(f.fid, b"\x01" * block)
            answered = 1

            async def store_on() -> None:
                nonlocal answered
                for value in range(2, 250):
                    await a.store(f.fid, bytes([value]) * block)
                    answered = value

            async with trio.open_nursery() as nursery:
                nursery.start_soon(store_until_lost, store_on)
                await trio.sleep(0.3)
                server.end(signal.SIGKILL)
    with daemon(folder, "--lease", "1") as server:
        async with client_of(server) as a:
            entry = await a.stat(f.fid)
            data = await a.fetch(f.fid)
            assert len(data) == block == entry.status.size
            assert set(data) <= {answered, answered + 1}
            assert entry.status.version > (f.status.incarnation, f.status.data_version + answered - 1)


async def store_until_lost(store: object) -> None:
    from promisefs_protocol.transport import ConnectionLost

    try:
        await store()  # type: ignore[operator]
    except ConnectionLost:
        return
