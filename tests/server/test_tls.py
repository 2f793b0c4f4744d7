"""TLS: who is trusted, and what happens between ends of which only one speaks it."""

from __future__ import annotations

import datetime
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from promisefs_protocol import tls
from promisefs_protocol.address import Address
from promisefs_protocol.messages import FetchStatus
from promisefs_protocol.tcp import connect
from promisefs_protocol.tls import TlsError, client_context, dialler, ends_of, server_context
from promisefs_protocol.transport import ConnectionLost
from promisefs_server.administration.certificates import make_certificates
from promisefs_server.service import Fileserver
from promisefs_server.store.store import Store
from server_cell import Client

NOW = datetime.datetime.now(datetime.UTC)
Dial = Callable[[Address], Awaitable[trio.abc.Stream]]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CA and a certificate for this machine."""
    folder = tmp_path_factory.mktemp("site")
    assert make_certificates(folder, ["localhost", "127.0.0.1"], NOW)
    return folder


def new_store(folder: Path) -> Store:
    folder.mkdir(exist_ok=True)
    return Store.open(folder / "store", time.time_ns())


@asynccontextmanager
async def serving(folder: Path, context: ssl.SSLContext | None, dial: Dial) -> AsyncIterator[Client]:
    """A server at a free port, and a client that has not connected yet."""
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
            address = Address("127.0.0.1", listener.socket.getsockname()[1])
            server = Fileserver(new_store(folder), tls=context)
            await nursery.start(server.run, [listener])
            token = server.registry.authority.server_token()
            yield Client(lambda: dial(address), nursery, None, lambda store: token)
            nursery.cancel_scope.cancel()


def context_of(site: Path) -> ssl.SSLContext:
    return server_context(site / "server.pem", site / "server.key")


async def test_a_mount_of_a_server_that_it_trusts(site: Path, tmp_path: Path) -> None:
    async with serving(tmp_path, context_of(site), dialler(client_context(site / "ca.pem"))) as client:
        await client.connect()
        made = await client.create(b"f")
        content = bytes(range(256)) * 4096  # a whole bulk
        await client.store(made.fid, content)
        assert await client.fetch(made.fid) == content
        assert (await client.call(FetchStatus(made.fid))).entry.status.size == len(content)


async def test_the_ends_of_a_secure_connection_are_known(site: Path) -> None:
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = listener.socket.getsockname()[1]
    async with listener, trio.open_nursery() as nursery:

        async def serve() -> None:
            await (await tls.accept(await listener.accept(), context_of(site))).aclose()

        nursery.start_soon(serve)
        stream = await dialler(client_context(site / "ca.pem"))(Address("127.0.0.1", port))
        ends = ends_of(stream)
        assert ends is not None and ends.peer == ("127.0.0.1", port)
        await trio.aclose_forcefully(stream)


async def test_servers_that_are_not_trusted(site: Path, tmp_path: Path) -> None:
    make_certificates(tmp_path / "other", ["127.0.0.1"], NOW)
    async with serving(tmp_path, context_of(site), dialler(client_context(tmp_path / "other" / "ca.pem"))) as client:
        with pytest.raises(TlsError, match="not trusted"):
            await client.connect()
    async with serving(tmp_path / "x", context_of(site), dialler(client_context(None))) as client:
        with pytest.raises(TlsError, match="not trusted"):
            await client.connect()


@pytest.mark.parametrize(
    ("hosts", "made"), [(["elsewhere.example"], NOW), (["127.0.0.1"], NOW - datetime.timedelta(days=400))],
    ids=["of another host", "expired"],
)  # fmt: skip
async def test_certificates_that_do_not_hold(tmp_path: Path, hosts: list[str], made: datetime.datetime) -> None:
    site = tmp_path / "site"
    make_certificates(site, hosts, made)
    async with serving(tmp_path, context_of(site), dialler(client_context(site / "ca.pem"))) as client:
        with pytest.raises(TlsError, match="not trusted"):
            await client.connect()


async def test_only_one_end_speaks_it(site: Path, tmp_path: Path) -> None:
    async with serving(tmp_path / "1", context_of(site), connect) as client:
        with pytest.raises(ConnectionLost):
            await client.connect()
    async with serving(tmp_path / "2", None, dialler(client_context(site / "ca.pem"))) as client:
        with pytest.raises(TlsError):
            await client.connect()


async def test_who_does_not_finish_the_handshake_is_dropped(
    site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tls, "HANDSHAKE_TIMEOUT_S", 0.1)
    async with serving(tmp_path, context_of(site), connect) as client:
        stream = await client._connect()
        assert await stream.receive_some() == b""
        await trio.aclose_forcefully(stream)


def test_keys_are_their_owners_and_the_ca_is_kept(tmp_path: Path) -> None:
    folder = tmp_path / "site"
    assert make_certificates(folder, ["a.example", "10.0.0.1", "::1"], NOW)
    ca = (folder / "ca.pem").read_bytes()
    for name in ("ca.key", "server.key"):
        assert (folder / name).stat().st_mode & 0o777 == 0o600
    assert not make_certificates(folder, ["b.example"], NOW)
    assert (folder / "ca.pem").read_bytes() == ca
