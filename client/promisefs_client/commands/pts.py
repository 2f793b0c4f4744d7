"""`promisefs pts`: users and groups, in the words of AFS's `pts`."""

from __future__ import annotations

from typing import Any

import click
import trio
from promisefs_protocol.identity_messages import (
    AddToGroup,
    ChangeOwner,
    CreateGroup,
    CreateUser,
    DeletePrincipal,
    Examine,
    ListEntries,
    ListMembership,
    Principal,
    RemoveFromGroup,
    RenamePrincipal,
)

from promisefs_client.network.commands_session import commands_session

from .login import CA, MOUNTPOINT, SERVER, TLS, ServerMeant, authenticated, servers_meant

_NAME = click.argument("name")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@SERVER
@MOUNTPOINT
@TLS
@CA
@click.pass_context
def pts(context: click.Context, server: str | None, mountpoint: str | None, tls: bool, ca: str | None) -> None:
    """Users and groups of a server: by default that of the only mount; of a cell its first."""
    context.obj = server, mountpoint, tls, ca


def _ask(context: click.Context, request: Any) -> Any:
    return trio.run(_ask_server, servers_meant(*context.obj)[0], request)


async def _ask_server(server: ServerMeant, request: Any) -> Any:
    async with commands_session(*server) as session:
        await session.present(authenticated(session))
        return await session.call(request)


@pts.command()
@_NAME
@click.option("--id", "number", type=click.IntRange(1, 2**31 - 1), help="The user's id, best their uid.")
@click.pass_context
def createuser(context: click.Context, name: str, number: int | None) -> None:
    """Make the user NAME, who has no password yet."""
    entry = _ask(context, CreateUser(name, number)).entry
    click.echo(f"User {entry.name} has id {entry.id}")


@pts.command()
@_NAME
@click.option("--owner", help="Who decides who is in it.  [default: you]")
@click.pass_context
def creategroup(context: click.Context, name: str, owner: str | None) -> None:
    """Make the group NAME: OWNER:NAME, or for administrators also without an owner's name."""
    entry = _ask(context, CreateGroup(name, owner)).entry
    click.echo(f"group {entry.name} has id {entry.id}")


@pts.command()
@click.argument("user")
@click.argument("group")
@click.pass_context
def adduser(context: click.Context, user: str, group: str) -> None:
    """Put USER, which may be a group itself, into GROUP."""
    _ask(context, AddToGroup(user, group))


@pts.command()
@click.argument("user")
@click.argument("group")
@click.pass_context
def removeuser(context: click.Context, user: str, group: str) -> None:
    """Take USER out of GROUP."""
    _ask(context, RemoveFromGroup(user, group))


@pts.command()
@_NAME
@click.pass_context
def membership(context: click.Context, name: str) -> None:
    """Say which groups a user is in, or who is in a group."""
    entry = _ask(context, Examine(name)).entry
    names = _ask(context, ListMembership(name)).names
    head = "Members of {} (id: {}) are:" if entry.id < 0 else "Groups {} (id: {}) is a member of:"
    click.echo(head.format(entry.name, entry.id))
    for name in names:
        click.echo(f"  {name}")


@pts.command()
@click.argument("names", metavar="NAME...", nargs=-1, required=True)
@click.pass_context
def examine(context: click.Context, names: tuple[str, ...]) -> None:
    """Show users and groups."""
    for name in names:
        entry: Principal = _ask(context, Examine(name)).entry
        click.echo(f"Name: {entry.name}, id: {entry.id}, owner: {entry.owner_name}, creator: {entry.creator_name},")
        click.echo(f"  membership: {entry.memberships}{', disabled' if entry.disabled else ''}.")


@pts.command()
@click.option("--users", is_flag=True, help="Users; the default.")
@click.option("--groups", is_flag=True, help="Groups.")
@click.pass_context
def listentries(context: click.Context, users: bool, groups: bool) -> None:
    """List users, groups, or both."""
    head = f"{'Name':<24} {'ID':>6} {'Owner':>6} Creator"
    after: int | None = None
    more = True
    while more:
        reply = _ask(context, ListEntries(after, users or not groups, groups))
        if after is None:
            click.echo(head)
        for entry in reply.entries:
            click.echo(f"{entry.name:<24} {entry.id:>6} {entry.owner:>6} {entry.creator_name}")
            after = entry.id
        more = reply.more


@pts.command()
@click.argument("names", metavar="NAME...", nargs=-1, required=True)
@click.pass_context
def delete(context: click.Context, names: tuple[str, ...]) -> None:
    """Delete users and groups for good. Their ids are never given again."""
    for name in names:
        _ask(context, DeletePrincipal(name))


@pts.command()
@_NAME
@click.argument("owner")
@click.pass_context
def chown(context: click.Context, name: str, owner: str) -> None:
    """Give a group to somebody else. Its name then begins with theirs."""
    _ask(context, ChangeOwner(name, owner))


@pts.command()
@click.argument("old")
@click.argument("new")
@click.pass_context
def rename(context: click.Context, old: str, new: str) -> None:
    """Rename a user, with their groups, or a group."""
    _ask(context, RenamePrincipal(old, new))
