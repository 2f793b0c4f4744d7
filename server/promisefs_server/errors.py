"""What can go wrong with the server as such, as its operator has to be told."""

from __future__ import annotations

import enum


class ExitCode(enum.IntEnum):
    """Exit codes of promisefsd; documented in the README."""

    OK = 0
    FAILURE = 1  # anything else, see the message
    USAGE = 2  # the command line (click's own code), or the cell file
    STORE = 3  # the store directory is missing, locked, foreign or damaged
    ADDRESS = 4  # the address is in use, unknown or refused
    VOLUME = 5  # no such volume, a name that is taken or wrong, or something that cannot be done with this one
    DAMAGE = 6  # the store, or a copy of it, is damaged, as a check has found
    USER = 7  # no such user or group, or a name that is taken or wrong


class StoreError(Exception):
    """The store cannot be used. The message is for people: what is wrong with which path, and what to do."""


class StoreLocked(StoreError):
    """A server, or another command, is using the store."""


class VolumeError(Exception):
    """A command about volumes cannot be carried out. The message is for people."""


class UserError(Exception):
    """A command about users cannot be carried out. The message is for people."""


class AddressError(Exception):
    """The server cannot listen where it was told to. The message is for people."""
