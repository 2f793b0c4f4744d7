"""`promisefs fs` on access control lists, in AFS's words.

They ask through the file system itself, by extended attributes: so whoever may use a mount uses them as who he is.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager

import click
from promisefs_protocol.rights import CHANGES_ONLY, AclEntry, acl_text, parse_acl, parse_rights, rights_text

from promisefs_client.errors import ExitCode, UserError

from .status_view import printable

_ACL, _ACCESS = "afs.acl", "afs.access"


@click.command(epilog="\b\nExample:\n  promisefs fs listacl /mnt/projects")
@click.argument("paths", metavar="[PATH]...", nargs=-1)
def listacl(paths: tuple[str, ...]) -> None:
    """Show who may do what in a directory; of a file that is the directory that it is in."""
    with _going_on() as attempt:
        for path in paths or (".",):
            with attempt():
                _show(path, _read_acl(path))


@click.command(
    context_settings={"ignore_unknown_options": True},
    epilog="\b\nExamples:\n  promisefs fs setacl /mnt/projects alice write system:anyuser none\n"
    "  promisefs fs setacl /mnt/projects mallory rl --negative",
)
@click.argument("directory", metavar="DIR")
@click.argument("pairs", metavar="NAME RIGHTS [NAME RIGHTS]...", nargs=-1, required=True)
@click.option("--clear", is_flag=True, help="Nobody else is left in the list.")
@click.option("--negative", is_flag=True, help="Take these rights away, whoever else gives them.")
def setacl(directory: str, pairs: tuple[str, ...], clear: bool, negative: bool) -> None:
    """Say what users and groups may do in DIR and with the files in it.

    \b
    RIGHTS are letters, or one of
      read   rl       look, and read files
      write  rlidwk   everything but changing the list
      all    rlidwka
      none            no entry
    r read files, l list, i insert names, d delete names, w write files, k lock files, a administer the list;
    A to H mean what you have them mean. New directories begin with the list of the one that they are in.
    """
    if len(pairs) % 2:
        raise UserError(f"{pairs[-1]!r} has no rights: give names and rights in turn", ExitCode.USAGE)
    try:
        entries = [
            AclEntry(name, int(parse_rights(rights)), negative)
            for name, rights in zip(pairs[::2], pairs[1::2], strict=True)
        ]
        text = acl_text(entries)
        parse_acl(text)
    except ValueError as error:
        raise UserError(str(error), ExitCode.USAGE) from None
    _write_acl(directory, text if clear else CHANGES_ONLY + text, entries)


@click.command(epilog="\b\nExample:\n  promisefs fs copyacl /mnt/projects /mnt/archive /mnt/old")
@click.argument("source", metavar="FROM")
@click.argument("targets", metavar="TO...", nargs=-1, required=True)
@click.option("--clear", is_flag=True, help="Nobody else is left in the lists.")
def copyacl(source: str, targets: tuple[str, ...], clear: bool) -> None:
    """Give directories the entries that the list of another has."""
    entries = _read_acl(source)
    with _going_on() as attempt:
        for target in targets:
            with attempt():
                _write_acl(target, ("" if clear else CHANGES_ONLY) + acl_text(entries), entries)


@click.command()
@click.argument("paths", metavar="[PATH]...", nargs=-1)
def getcalleraccess(paths: tuple[str, ...]) -> None:
    """Show what you may do."""
    with _going_on() as attempt:
        for path in paths or (".",):
            with attempt():
                with _errors_of(path):
                    rights = os.getxattr(path, _ACCESS).decode()
                click.echo(f"Callers access to {printable(path)} is {rights or 'none'}")


@click.command()
@click.argument("paths", metavar="[PATH]...", nargs=-1)
def whoami(paths: tuple[str, ...]) -> None:
    """Show whom the server of a file takes you for."""
    with _going_on() as attempt:
        for path in paths or (".",):
            with attempt():
                with _errors_of(path):
                    name, number, *groups = os.getxattr(path, "afs.whoami").decode().splitlines()
                click.echo(f"{name} ({number}), in {', '.join(groups)}")


def _show(path: str, entries: Iterable[AclEntry]) -> None:
    click.echo(f"Access list for {printable(path)} is")
    for heading, negative in (("Normal rights:", False), ("Negative rights:", True)):
        some = [entry for entry in entries if entry.negative is negative]
        if some or not negative:
            click.echo(heading)
        for entry in some:
            click.echo(f"  {printable(entry.name)} {rights_text(entry.rights)}")


def _read_acl(path: str) -> tuple[AclEntry, ...]:
    with _errors_of(path):
        value = os.getxattr(path, _ACL)
    return parse_acl(value.decode())


def _write_acl(directory: str, text: str, entries: Iterable[AclEntry]) -> None:
    names = ", ".join(printable(entry.name) for entry in entries)
    with _errors_of(directory, f"there is no user or group of one of these names: {names}"):
        os.setxattr(directory, _ACL, text.encode())


@contextmanager
def _errors_of(path: str, nobody: str = "its directory is gone") -> Iterator[None]:
    try:
        os.lstat(path)
    except OSError as error:
        raise UserError(f"{printable(path)}: {error.strerror}") from None
    try:
        yield
    except OSError as error:
        match error.errno:
            case errno.ENOENT:
                raise UserError(nobody) from None
            case errno.ENODATA | errno.EOPNOTSUPP:
                raise UserError(f"{printable(path)} is not in a promisefs mount", ExitCode.MOUNTPOINT) from None
            case errno.EACCES:
                raise UserError(f"{printable(path)}: you don't have the required access rights on it") from None
            case errno.EAGAIN:
                raise UserError(f"{printable(path)}: its list would be too long") from None
        raise UserError(f"{printable(path)}: {error.strerror}") from None


@contextmanager
def _going_on() -> Iterator[Callable[[], AbstractContextManager[None]]]:
    """Do each of several things, whatever becomes of the others; end with failure if one has failed."""
    failed = False

    @contextmanager
    def attempt() -> Iterator[None]:
        nonlocal failed
        try:
            yield
        except UserError as error:
            click.echo(f"promisefs: {error}", err=True)
            failed = True

    yield attempt
    if failed:
        sys.exit(ExitCode.FAILURE)
