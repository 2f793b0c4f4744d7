"""The command promisefsd."""

from __future__ import annotations

import errno
import ipaddress
import logging
import resource
import signal
import socket
import ssl
import time
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import click
import trio
from promisefs_protocol import collector, service_manager, tls
from promisefs_protocol.address import DEFAULT_PORT, Address, AddressSyntaxError, parse_address
from promisefs_protocol.cell_file import CellFileError, load_cell_file
from promisefs_protocol.config_file import Configured
from promisefs_protocol.local_server import LocalServer
from promisefs_protocol.manual import install_man
from promisefs_protocol.observe import exposition, logs
from promisefs_protocol.observe.logs import LogFormat
from promisefs_protocol.observe.metrics import encoded

from .commands.backup import backup
from .commands.cert import cert
from .commands.check import check
from .commands.failures import reported
from .commands.top import top
from .commands.users import users
from .commands.volume import volume
from .errors import AddressError
from .identity.local_token import left_for_mounts
from .observe.metrics import METRICS
from .service import DEFAULT_LEASE_S, Fileserver
from .store.membership import ALONE, Membership, membership_in
from .store.store import Store

log = logging.getLogger(__name__)

DEFAULT_HOST = "127.0.0.1"
MIN_LEASE_S, MAX_LEASE_S = 0.5, 3600.0
SHUTDOWN_SIGNALS = (signal.SIGTERM, signal.SIGINT)


_EPILOG = "Exit codes: 0 ended by SIGTERM or SIGINT, 1 failure, 2 usage or cell file, 3 store, 4 address."


@click.group(
    epilog="Exit codes: 0 done, 1 failure, 2 usage or cell file, 3 store, 4 address, 5 volume, 6 damage, 7 user.",
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(package_name="promisefs", prog_name="promisefsd")
def main() -> None:
    """The promisefs file server."""


main.add_command(top)
main.add_command(install_man("promisefsd", main))
main.add_command(volume)
main.add_command(backup)
main.add_command(check)
main.add_command(users)
main.add_command(cert)


@main.command(cls=Configured, epilog=_EPILOG)
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path, readable=False))
@click.option(
    "--listen",
    metavar="HOST:PORT",
    help=f"Address to serve at.  [default: the cell file's, or {DEFAULT_HOST}:{DEFAULT_PORT}]",
)  # fmt: skip
@click.option(
    "--cell", metavar="FILE", type=click.Path(path_type=Path), help="Be one of the servers in this cell file."
)
@click.option("--number", type=int, help="Which of them. A store keeps its cell and number for ever.")
@click.option("--port", type=click.IntRange(0, 65535), help="Port to serve at; 0 picks a free one.")
@click.option(
    "--lease", type=click.FloatRange(MIN_LEASE_S, MAX_LEASE_S), default=DEFAULT_LEASE_S, show_default=True,
    metavar="SECONDS", help="How long a client that does not answer can hold up a change.",
)  # fmt: skip
@click.option("--log-file", type=click.Path(path_type=Path, dir_okay=False), help="Log here instead of to stderr.")
@click.option("--metrics", metavar="HOST:PORT", help=f"Serve Prometheus metrics at http://HOST:PORT{exposition.PATH}.")
@click.option("--metrics-insecure", is_flag=True, help="Also at an address that other machines reach.")
@click.option(
    "--log-format", type=click.Choice([form.value for form in LogFormat]), default=LogFormat.TEXT.value,
    show_default=True,
    help="Text for people, or one JSON object a line.",
)  # fmt: skip
@click.option("--verbose", "-v", is_flag=True, help="Log every event: breaks, calls...")
@click.option(
    "--insecure",
    is_flag=True,
    help="Listen on addresses that other machines reach. Everybody in between sees everything!",
)
@click.option("--tls-cert", metavar="FILE", type=click.Path(path_type=Path), help="Speak TLS, with this certificate.")
@click.option("--tls-key", metavar="FILE", type=click.Path(path_type=Path), help="Its private key.")
@click.option(
    "--trust-everybody", is_flag=True,
    help="Take everybody who has no token for an administrator: for containers that are by themselves.",
)  # fmt: skip
def serve(
    directory: Path, listen: str | None, cell: Path | None, number: int | None, port: int | None, lease: float,
    metrics: str | None, metrics_insecure: bool,
    log_file: Path | None, log_format: str, verbose: bool, insecure: bool,
    tls_cert: Path | None, tls_key: Path | None, trust_everybody: bool,
) -> None:  # fmt: skip
    """Serve the store in DIR, which is made if it is not there.

    Prints one line when ready, with "listening on HOST:PORT" in it. SIGTERM ends it cleanly.

    \b
    Examples:
      promisefsd serve ~/files
      promisefsd serve /srv/promisefs --port 0
      promisefsd serve /srv/promisefs --listen [::1]:7000
      promisefsd serve /srv/beta --cell /etc/promisefs/cell.toml --number 1
      promisefsd serve --config /etc/promisefs/server.toml    (directory = "/srv/promisefs", lease = 10...)
    """
    with reported():
        membership, address = _place(cell, number, listen, port)
        metrics_address = None if metrics is None else _metrics_address(metrics)
        _start_logging(log_file, LogFormat(log_format), verbose)
        _raise_file_limit()
        collector.set_for_daemon()
        access = Access(insecure, trust_everybody, _tls_context(tls_cert, tls_key))
        trio.run(_serve, directory, membership, address, lease, access, metrics_address, metrics_insecure)


class Access(NamedTuple):
    """Who may come, and how."""

    insecure: bool
    trusts_everybody: bool
    tls: ssl.SSLContext | None


def _tls_context(certificate: Path | None, key: Path | None) -> ssl.SSLContext | None:
    if certificate is None and key is None:
        return None
    if certificate is None or key is None:
        raise click.UsageError("--tls-cert and --tls-key go together; 'promisefsd cert' makes both")
    try:
        return tls.server_context(certificate, key)
    except OSError as error:
        raise click.UsageError(f"{certificate}, {key}: {error.strerror or error}") from None


def _place(cell: Path | None, number: int | None, listen: str | None, port: int | None) -> tuple[Membership, Address]:
    """Which server this is, and where it listens: where the cell file says, unless told otherwise."""
    if cell is None and number is None:
        return ALONE, _address(listen, port, Address(DEFAULT_HOST, DEFAULT_PORT))
    if cell is None or number is None:
        raise click.UsageError("--cell and --number go together: which cell, and which of its servers this is")
    file = load_cell_file(cell)
    server = file.server(number)
    if server is None:
        raise CellFileError(f"{cell} has no server number {number}")
    return membership_in(file, number), _address(listen, port, server.address)


def _address(listen: str | None, port: int | None, default: Address) -> Address:
    """Read HOST:PORT, [HOST]:PORT, HOST or :PORT; --port decides over it."""
    address = default
    if listen is not None:
        try:
            address = parse_address(DEFAULT_HOST + listen if listen.startswith(":") else listen, lowest_port=0)
        except AddressSyntaxError as error:
            raise click.BadParameter(str(error), param_hint="--listen") from None
    return address if port is None else address._replace(port=port)


def _start_logging(log_file: Path | None, log_format: LogFormat, verbose: bool) -> None:
    handler = logging.StreamHandler() if log_file is None else logging.FileHandler(log_file)
    logs.set_up(handler, log_format, "%(asctime)s %(levelname)s %(message)s", verbose=verbose)


def _raise_file_limit() -> None:
    """Allow as many descriptors as we may have: connections and data files take one each."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _metrics_address(text: str) -> Address:
    try:
        return parse_address(text, lowest_port=0)
    except AddressSyntaxError as error:
        raise click.BadParameter(str(error), param_hint="--metrics") from None


async def _listen_for_scrapers(address: Address, insecure: bool) -> list[trio.SocketListener]:
    try:
        listeners = await exposition.open_listeners(address, insecure=insecure)
    except exposition.MetricsAddressError as error:
        raise AddressError(str(error)) from None
    log.info("metrics are at http://%s%s", exposition.bound_address(listeners), exposition.PATH)
    return listeners


async def _serve(
    directory: Path, membership: Membership, address: Address, lease_s: float, access: Access,
    metrics: Address | None, metrics_insecure: bool,
) -> None:  # fmt: skip
    with trio.open_signal_receiver(*SHUTDOWN_SIGNALS) as signals:
        listeners = await _listen(address.host, address.port, access.insecure or access.tls is not None)
        scrapers = [] if metrics is None else await _listen_for_scrapers(metrics, metrics_insecure)
        store = Store.open(directory, time.time_ns(), membership)
        server = Fileserver(store, lease_s, trusts_everybody=access.trusts_everybody, tls=access.tls)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_stop_at_signal, server, signals)
            addresses = tuple(listener.socket.getsockname()[:2] for listener in listeners)
            # First, so that a mount that comes back to us finds the token of this run.
            with left_for_mounts(store.uuid, LocalServer(server.registry.authority.server_token(), addresses)):
                async with trio.open_nursery() as running:
                    await running.start(server.run, listeners)
                    if scrapers:
                        nursery.start_soon(exposition.serve, scrapers, partial(_scrape, server))
                    bound = Address(*addresses[0])
                    click.echo(f"promisefsd: serving {directory}, listening on {bound}")
                    service_manager.notify(service_manager.READY, f"STATUS=listening on {bound}")
            nursery.cancel_scope.cancel()


async def _scrape(server: Fileserver, accept: str) -> tuple[bytes, str]:
    report = await server.statistics.report()
    return await trio.to_thread.run_sync(encoded, METRICS, report, accept)


async def _stop_at_signal(server: Fileserver, signals: AsyncIterator[int]) -> None:
    async for number in signals:
        log.info("%s: shutting down", signal.Signals(number).name)
        service_manager.notify(service_manager.STOPPING)
        server.stop()


async def _listen(host: str, port: int, others_may_come: bool) -> list[trio.SocketListener]:
    try:
        addresses = await trio.socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise AddressError(f"cannot resolve {host!r}: {error.strerror}; give an address of this machine") from None
    for address in addresses:
        if not others_may_come and not ipaddress.ip_address(str(address[4][0]).partition("%")[0]).is_loopback:
            raise AddressError(
                f"{host} can be reached by other machines, and anybody in between could read and change what passes: "
                "use TLS (--tls-cert), serve at a loopback address, or say --insecure"
            )
    if port == 0:
        # Each address of a name would get another port: one is enough.
        host = str(addresses[0][4][0])
    try:
        return list(await trio.open_tcp_listeners(port, host=host))
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise AddressError(f"{host}:{port} is in use: give another port, or --port 0 for a free one") from None
        raise AddressError(f"cannot listen on {host}:{port}: {error.strerror}") from None
