"""The command promisefsd cert."""

from __future__ import annotations

import datetime
import socket
from pathlib import Path

import click

from promisefs_server.administration.certificates import (
    CA_KEY_NAME,
    CA_NAME,
    SERVER_DAYS,
    SERVER_KEY_NAME,
    SERVER_NAME,
    make_certificates,
)
from promisefs_server.errors import StoreError

from .failures import reported

_ALWAYS = ("localhost", "127.0.0.1", "::1")


@click.command(epilog="Exit codes: 0 done, 1 failure, 2 usage, 3 the directory cannot be used.")
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@click.option(
    "--host", "hosts", metavar="NAME", multiple=True,
    help="What clients call the server, a name or an address; may be repeated.  [default: this machine's name]",
)  # fmt: skip
def cert(directory: Path, hosts: tuple[str, ...]) -> None:
    """Make a server certificate for TLS in DIR, and before it a CA for your site if DIR has none.

    Clients get DIR/ca.pem. DIR/ca.key makes certificates that they trust: keep it to yourself. Run it again before the
    certificate's end, or for another server.

    \b
    Examples:
      promisefsd cert /etc/promisefs/tls --host files.example.org
      promisefsd serve /srv/promisefs --listen 0.0.0.0 --tls-cert .../server.pem --tls-key .../server.key
      promisefs mount -o ca=ca.pem files.example.org /mnt
    """
    with reported():
        names = list(dict.fromkeys((*(hosts or (socket.getfqdn(),)), *_ALWAYS)))
        try:
            made_ca = make_certificates(directory, names, datetime.datetime.now(datetime.UTC))
        except ValueError as error:
            raise StoreError(f"{directory}: {error}") from None
        if made_ca:
            click.echo(
                f"made {directory / CA_NAME}, which clients need, and {directory / CA_KEY_NAME}, the secret of it"
            )
        click.echo(f"made {directory / SERVER_NAME} and {directory / SERVER_KEY_NAME} for {', '.join(names)}")
        click.echo(f"good for {SERVER_DAYS} days")
