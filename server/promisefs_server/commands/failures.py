"""How commands fail: one line on stderr, and an exit code."""

from __future__ import annotations

import contextlib
import sqlite3
import sys
from collections.abc import Iterator

import click
from promisefs_protocol.abort import AbortCode, Aborted
from promisefs_protocol.cell_file import CellFileError

from promisefs_server.errors import AddressError, ExitCode, StoreError, UserError, VolumeError

EXPECTED = (StoreError, AddressError, CellFileError, VolumeError, UserError, Aborted, OSError, sqlite3.Error)
_ABOUT_VOLUMES = (AbortCode.VNOVOL, AbortCode.VMOVED, AbortCode.EXIST, AbortCode.PERM, AbortCode.INVAL)


@contextlib.contextmanager
def reported() -> Iterator[None]:
    """End the process with a line and an exit code if what is done within fails in an expected way."""
    failure: BaseException | None = None
    try:
        yield
    except* EXPECTED as group:
        failure = group
        while isinstance(failure, BaseExceptionGroup):
            failure = failure.exceptions[0]
    if failure is not None:
        text = failure.message if isinstance(failure, Aborted) and failure.message else str(failure)
        click.echo(f"promisefsd: {text}", err=True)
        sys.exit(_code_of(failure))


def _code_of(failure: BaseException) -> ExitCode:
    match failure:
        case CellFileError():
            return ExitCode.USAGE
        case StoreError():
            return ExitCode.STORE
        case AddressError():
            return ExitCode.ADDRESS
        case UserError():
            return ExitCode.USER
        case VolumeError():
            return ExitCode.VOLUME
        case Aborted(code=code) if code in _ABOUT_VOLUMES:
            return ExitCode.VOLUME
    return ExitCode.FAILURE
