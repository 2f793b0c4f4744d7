"""The commands promisefsd users."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import trio
from promisefs_protocol.abort import Aborted
from promisefs_protocol.identity_messages import (
    AddToGroup,
    CreateUser,
    DeletePrincipal,
    Examine,
    IssueToken,
    ListEntries,
    Principal,
    RevokeTokens,
    RotateKeys,
    SetDisabled,
    SetPassword,
)
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from promisefs_server.errors import UserError

from .asking import ask
from .failures import reported

ADMINISTRATORS_NAME = "system:administrators"
LONGEST_PASSWORD = 255
WIDE = 200
"""Columns of a table that does not go to a terminal, so that nothing is wrapped."""
_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_EPILOG = "Exit codes: 0 done, 1 failure, 2 usage, 3 store, 7 no such user, or it cannot be done with this one."
_DIRECTORY = click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
_PASSWORD_FILE = click.option(
    "--password-file", type=click.File("r"), help="Read the password from the first line of this file; - is stdin."
)


@click.group(epilog=_EPILOG)
def users() -> None:
    """Who may use the server: add, list and remove users, set passwords, give and revoke tokens.

    DIR is a server's store. If the server runs, it is asked through the control socket in DIR; else the command works
    on the store itself. Whoever can use DIR is an administrator without being a user.
    """


@contextlib.contextmanager
def _about_users() -> Iterator[None]:
    """What the server refuses is a mistake about users."""
    with reported():
        try:
            yield
        except* Aborted as group:
            failure: BaseException = group
            while isinstance(failure, BaseExceptionGroup):
                failure = failure.exceptions[0]
            assert isinstance(failure, Aborted)
            raise UserError(failure.message or str(failure)) from None


def _password(file: Any) -> str:
    if file is not None:
        text: str = file.readline().rstrip("\n")
    elif sys.stdin.isatty():
        text = click.prompt("Password", hide_input=True, confirmation_prompt=True, err=True)
    else:
        raise click.UsageError("there is nobody to ask: give --password-file FILE")
    if not 0 < len(text) <= LONGEST_PASSWORD:
        raise click.UsageError(f"a password has 1 to {LONGEST_PASSWORD} characters")
    return text


@users.command(epilog=_EPILOG)
@_DIRECTORY
@click.argument("name")
@click.option(
    "--id", "number", type=click.IntRange(1, 2**31 - 1), help="The user's id, best their uid. [default: the next]"
)
@click.option("--admin", is_flag=True, help="Put the user into system:administrators.")
@click.option("--no-password", is_flag=True, help="The user cannot log in with one; see 'users token'.")
@_PASSWORD_FILE
def add(directory: Path, name: str, number: int | None, admin: bool, no_password: bool, password_file: Any) -> None:
    """Add the user NAME.

    \b
    Examples:
      promisefsd users add /srv/promisefs alice --id 1000 --admin
      promisefsd users add /srv/promisefs ci --no-password
    """
    with _about_users():
        password = None if no_password else _password(password_file)
        entry = trio.run(ask, directory, CreateUser(name, number)).entry
        if password is not None:
            trio.run(ask, directory, SetPassword(name, "", password))
        if admin:
            trio.run(ask, directory, AddToGroup(name, ADMINISTRATORS_NAME))
        click.echo(f"User {name} has id {entry.id}")


@users.command(epilog=_EPILOG)
@_DIRECTORY
@click.argument("name")
@_PASSWORD_FILE
def passwd(directory: Path, name: str, password_file: Any) -> None:
    """Set the password of the user NAME. Tokens that were given before stay good: see 'users revoke'."""
    with _about_users():
        trio.run(ask, directory, SetPassword(name, "", _password(password_file)))


@users.command("list", epilog=_EPILOG)
@_DIRECTORY
@click.option("--json", "as_json", is_flag=True, help="For programs: a list of objects.")
def list_(directory: Path, as_json: bool) -> None:
    """List the users."""
    with _about_users():
        entries = trio.run(_list, directory)
        if as_json:
            click.echo(json.dumps([entry._asdict() for entry in entries]))
            return
        console = Console() if sys.stdout.isatty() else Console(width=WIDE)
        table = Table("name", "id", "groups", "logs in", box=None, pad_edge=False, header_style="bold")
        for entry in entries:
            how = "disabled" if entry.disabled else "with a password" if entry.has_password else "with tokens only"
            table.add_row(escape(entry.name), str(entry.id), str(entry.memberships), how)
        console.print(table)


async def _list(directory: Path) -> list[Principal]:
    entries: list[Principal] = []
    more, after = True, 0
    while more:
        reply = await ask(directory, ListEntries(after, users=True, groups=False))
        entries += reply.entries
        more = reply.more
        after = reply.entries[-1].id if reply.entries else 0
    return entries


@users.command(epilog=_EPILOG)
@_DIRECTORY
@click.argument("name")
def disable(directory: Path, name: str) -> None:
    """Have the user NAME not log in any more, and no token of theirs be good for anything."""
    with _about_users():
        trio.run(ask, directory, SetDisabled(name, True))


@users.command(epilog=_EPILOG)
@_DIRECTORY
@click.argument("name")
def enable(directory: Path, name: str) -> None:
    """Undo 'users disable'."""
    with _about_users():
        trio.run(ask, directory, SetDisabled(name, False))


@users.command(epilog=_EPILOG)
@_DIRECTORY
@click.argument("name")
@click.option("--yes", is_flag=True, help="Do not ask.")
def remove(directory: Path, name: str, yes: bool) -> None:
    """Remove the user NAME for good. The id is never given again."""
    with _about_users():
        entry = trio.run(ask, directory, Examine(name)).entry
        if entry.id < 0:
            raise UserError(f"{name} is a group: see 'promisefs pts delete'")
        if not yes:
            if not sys.stdin.isatty():
                raise click.UsageError("there is nobody to ask: say --yes to remove it")
            click.confirm(f"Remove user {name} (id {entry.id}) for good?", abort=True)
        trio.run(ask, directory, DeletePrincipal(name))


@users.command(epilog=_EPILOG)
@_DIRECTORY
@click.argument("name")
@click.option("--lifetime", default="10h", show_default=True, help="How long it is good: a number and s, m, h or d.")
@click.option("--output", type=click.Path(path_type=Path), help="Write it to this file, which nobody else can read.")
def token(directory: Path, name: str, lifetime: str, output: Path | None) -> None:
    """Give a token for the user NAME, without a password: for services and CI.

    It goes to stdout, or to --output. 'promisefs login --token-file' uses it. Its serial number, for 'users revoke', is
    said on stderr.

    \b
    Example:
      promisefsd users token /srv/promisefs ci --lifetime 30d --output ci.token
    """
    with _about_users():
        match = re.fullmatch(r"(\d{1,9})([smhd])", lifetime)
        if match is None or not int(match[1]):
            raise click.BadParameter(f"{lifetime!r} is not like 10h or 30d", param_hint="--lifetime")
        seconds = min(int(match[1]) * _UNITS_S[match[2]], 2**32 - 1)
        issued = trio.run(ask, directory, IssueToken(name, seconds))
        if output is None:
            click.echo(issued.token.decode())
        else:
            _write_private(output, issued.token)
        until = time.strftime("%Y-%m-%d %H:%M", time.localtime(issued.expires_s))
        click.echo(f"promisefsd: token {issued.serial} for {name}, until {until}", err=True)


def _write_private(path: Path, content: bytes) -> None:
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with open(descriptor, "wb") as file:
        file.write(content + b"\n")


@users.command(epilog=_EPILOG)
@_DIRECTORY
@click.argument("name")
@click.option("--token", "serial", metavar="SERIAL", help="Only the one of this serial number.")
def revoke(directory: Path, name: str, serial: str | None) -> None:
    """Have all tokens that the user NAME was given be good for nothing from now on. Logging in gives new ones."""
    with _about_users():
        trio.run(ask, directory, RevokeTokens(name, serial))


@users.command("rotate-keys", epilog=_EPILOG)
@_DIRECTORY
def rotate_keys(directory: Path) -> None:
    """Sign tokens with a new key. Those that were given stay good till they expire."""
    with _about_users():
        trio.run(ask, directory, RotateKeys())
