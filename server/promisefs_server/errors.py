"""What can go wrong with the server as such, as its operator has to be told."""

from __future__ import annotations


class StoreError(Exception):
    """The store cannot be used. The message is for people: what is wrong with which path, and what to do."""


class AddressError(Exception):
    """The server cannot listen where it was told to. The message is for people."""
