"""Who makes a call, and through which mount."""

from __future__ import annotations

from typing import NamedTuple

from promisefs_server.promises.breaker import Contact
from promisefs_server.promises.hosts import Host

from .identity import Identity


class Caller(NamedTuple):
    contact: Contact
    identity: Identity

    @property
    def host(self) -> Host:
        return self.contact.host
