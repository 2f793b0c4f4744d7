"""`promisefs login`, `tokens`, `logout`."""

from __future__ import annotations

import getpass
import json
import os
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import click
import trio
from promisefs_protocol.address import Address, AddressSyntaxError, parse_address
from promisefs_protocol.identity_messages import IssuedToken, Login, Present

from promisefs_client.errors import ExitCode, UserError
from promisefs_client.identity import saved_tokens
from promisefs_client.identity.key import UserToken
from promisefs_client.network.commands_session import CommandsSession, commands_session
from promisefs_client.network.connections import dial_with
from promisefs_client.network.session import Dial

from .control_client import ask
from .mounts import MountEntry, find_mount, list_mounts

WAIT_S = 120.0
"""A mount stores what is dirty before it forgets a token."""

SERVER = click.option("--server", metavar="HOST[:PORT]", help="Not the servers of a mount, but this one.")
MOUNTPOINT = click.option("--mount", "mountpoint", metavar="MOUNTPOINT", help="The servers of this mount.")


TLS = click.option("--tls", is_flag=True, help="With --server: it speaks TLS, with a certificate of a CA known here.")
CA = click.option("--ca", metavar="FILE", help="With --server: it speaks TLS, with a certificate of a CA in this file.")


class ServerMeant(NamedTuple):
    address: Address
    dial: Dial


def servers_meant(server: str | None, mountpoint: str | None, tls: bool, ca: str | None) -> list[ServerMeant]:
    """The servers that a command is about: by default those of the only mount. Raise UserError."""
    if server is not None:
        try:
            return [ServerMeant(parse_address(server), _dial(tls, ca))]
        except AddressSyntaxError as error:
            raise UserError(f"{server!r} is not HOST[:PORT]: {error}", ExitCode.USAGE) from None
    mounts = [find_mount(mountpoint)] if mountpoint is not None else list_mounts()
    if len({entry.device for entry in mounts}) != 1:
        raise UserError("say which: --server HOST[:PORT], or --mount MOUNTPOINT", ExitCode.USAGE)
    return [
        ServerMeant(parse_address(there["address"]), _dial(there["tls"], there["ca"]))
        for there in ask(mounts[0], "servers", {})
    ]


def _dial(tls: bool, ca: str | None) -> Dial:
    return dial_with(tls=tls or ca is not None, ca=None if ca is None else Path(ca))


@click.command(
    epilog="\b\nExamples:\n  promisefs login alice --server files.example.org\n"
    "  promisefs login --mount /mnt/home\n  promisefs login --server files:7654 --token-file ci.token"
)
@click.argument("user", required=False)
@SERVER
@MOUNTPOINT
@TLS
@CA
@click.option("--password-file", type=click.File("r"), help="Read the password from its first line; - is stdin.")
@click.option("--token-file", type=click.File("r"), help="A token from 'promisefsd users token' instead of a password.")
@click.option("--hours", type=click.IntRange(1, 720), help="How long to stay logged in at most.  [default: 10]")
def login(
    user: str | None,
    server: str | None,
    mountpoint: str | None,
    tls: bool,
    ca: str | None,
    password_file: Any,
    token_file: Any,
    hours: int | None,
) -> None:
    """Get a token as USER (by default your local name) and use it in mounts: those there are, and yours that you make.

    The token is yours alone: other users of a mount need their own.
    """
    there = servers_meant(server, mountpoint, tls, ca)
    if token_file is not None:
        given = token_file.readline().strip().encode()
        found = [trio.run(_check, one, given) for one in there]
    else:
        name = user or getpass.getuser()
        password = _password(password_file, name)
        found = [trio.run(_log_in, one, name, password, 3600 * (hours or 0)) for one in there]
    for store, token in found:
        saved_tokens.save(store, token)
        taken = _hand_in(store, token)
        used = f", used by {', '.join(taken)}" if taken else ""
        click.echo(f"logged in as {token.name} at {token.server} until {_clock(token.expires_s)}{used}")


def _password(file: Any, name: str) -> str:
    if file is not None:
        text: str = file.readline().rstrip("\n")
    elif sys.stdin.isatty():
        text = click.prompt(f"Password of {name}", hide_input=True, err=True)
    else:
        raise UserError("there is nobody to ask: give --password-file FILE", ExitCode.USAGE)
    if not 0 < len(text) <= 255:
        raise UserError("a password has 1 to 255 characters", ExitCode.USAGE)
    return text


async def _log_in(server: ServerMeant, user: str, password: str, lifetime_s: int) -> tuple[bytes, UserToken]:
    async with commands_session(*server) as session:
        issued: IssuedToken = await session.call(Login(user, password, lifetime_s))
        return session.store, UserToken(
            issued.token, issued.user, issued.name, issued.serial, str(server.address), issued.expires_s, session.tls
        )
    raise AssertionError("the session raises")


async def _check(server: ServerMeant, token: bytes) -> tuple[bytes, UserToken]:
    async with commands_session(*server) as session:
        who = await session.call(Present(token))
        return session.store, UserToken(token, who.user, who.name, "", str(server.address), who.expires_s, session.tls)
    raise AssertionError("the session raises")


def _hand_in(store: bytes, token: UserToken) -> list[str]:
    """Have mounts of this server use it. Return where."""
    args = token._asdict() | {"store": store.hex(), "token": token.token.decode()}
    taken = []
    for entry in _usable_mounts():
        try:
            if ask(entry, "login", args)["accepted"]:
                taken.append(entry.mountpoint)
        except UserError as error:
            click.echo(f"promisefs: {error}", err=True)
    return taken


def _usable_mounts() -> list[MountEntry]:
    """Mounts that this user may use, each once."""
    by_device = {entry.device: entry for entry in list_mounts() if entry.usable_by(os.geteuid())}
    return list(by_device.values())


@click.command()
@click.option("--json", "as_json", is_flag=True, help="For programs: a list of objects.")
def tokens(as_json: bool) -> None:
    """Show your tokens: as whom, at which server, until when."""
    found = {(token.server, token.name): token for _, token in saved_tokens.all_saved()}
    now_s = time.time()
    if as_json:
        click.echo(
            json.dumps(
                [
                    {"name": t.name, "user": t.user, "server": t.server, "expires": t.expires_s, "serial": t.serial}
                    for t in found.values()
                ]
            )
        )
        return
    click.echo("Tokens held:")
    for token in found.values():
        until = f"Expires {_clock(token.expires_s)}" if token.expires_s > now_s else ">> Expired <<"
        click.echo(f"User {token.name} (id {token.user}) tokens for {token.server} [{until}]")
    click.echo("   --End of list--")


@click.command()
def logout() -> None:
    """Have mounts store what you wrote, then forget your tokens, and delete those that were saved."""
    failed = False
    for entry in _usable_mounts():
        try:
            ask(entry, "logout", {}, WAIT_S)
        except UserError as error:
            click.echo(f"promisefs: {error}", err=True)
            failed = True
    saved_tokens.forget_all()
    if failed:
        sys.exit(ExitCode.FAILURE)


def _clock(time_s: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(time_s))


def authenticated(session: CommandsSession) -> bytes:
    """The token of whoever runs this command. Raise UserError."""
    if session.own_token is None:
        raise UserError(f"you have no token for {session.address}: 'promisefs login' first")
    return session.own_token
