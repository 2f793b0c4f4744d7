"""The servers of a mount: a session with each, what each may call, and who has which volume."""

from __future__ import annotations

import os
import socket
import uuid
from functools import partial
from pathlib import Path

import trio
from promisefs_protocol.abort import AbortCode, Aborted
from promisefs_protocol.ids import Status
from promisefs_protocol.messages import FetchStatus
from promisefs_protocol.tcp import connect
from promisefs_protocol.tls import TlsError, client_context, dialler

from promisefs_client.errors import ExitCode, FsError, ServerUnavailable, UserError
from promisefs_client.identity.key import Keyring, LocalToken
from promisefs_client.identity.local_tokens import local_token
from promisefs_client.identity.saved_tokens import saved
from promisefs_client.locks.lock_manager import LockManager
from promisefs_client.options import MountOptions, Source
from promisefs_client.vnodes.volumes import Volume, Volumes

from . import clock
from .callbacks import CallbackService
from .cell import Cell
from .clock import Clock
from .locator import Locator
from .servers import Server
from .session import Dial, Refused, ServerSession

_NO_TOKEN = (AbortCode.ACCES, AbortCode.KEYEXPIRED, AbortCode.KEYREVOKED, AbortCode.KEYREJECTED)


def dial_with(*, tls: bool, ca: Path | None) -> Dial:
    """How servers are connected to. Raise UserError."""
    if not tls:
        return connect
    try:
        return dialler(client_context(ca))
    except OSError as error:
        raise UserError(f"{ca or 'the CAs of this system'}: {error.strerror or error}", ExitCode.USAGE) from None


class Connections:
    """`description` tells the servers' administrators who this is."""

    def __init__(
        self,
        source: Source,
        options: MountOptions,
        description: str,
        dial: Dial | None = None,
        now: Clock = clock.now,
        find_local_token: LocalToken = local_token,
    ) -> None:
        self._source = source
        self._timeout_s = options.timeout_s
        self.sessions: dict[Server, ServerSession] = {}
        """In the order of the cell file."""
        self.callbacks: list[CallbackService] = []
        self.volumes = Volumes()
        client = uuid.uuid4().bytes
        dial = dial or dial_with(tls=options.tls, ca=options.ca)
        keys = self.keys = Keyring(os.geteuid(), find_local_token, saved)
        for address in source.servers:
            server = Server(str(address))
            service = CallbackService(server, options.ack_wait_s)
            self.callbacks.append(service)
            self.sessions[server] = ServerSession(
                server, address, client, description, keys, options.timeout_s, service.serve, service.reset, dial, now
            )
        self.locator = Locator(list(self.sessions.values()), self.volumes)

    async def open(self, nursery: trio.Nursery) -> None:
        """Begin all sessions. A server alone has to be there (UserError); those of a cell may come later."""
        for session in self.sessions.values():
            if self._source.cell is None:
                await self._open_only(session, nursery)
            else:
                nursery.start_soon(session.keep_trying)
            nursery.start_soon(session.watch_lease)

    @staticmethod
    async def _open_only(session: ServerSession, nursery: trio.Nursery) -> None:
        address = session.address
        try:
            await nursery.start(session.run)
        except socket.gaierror as error:
            message = f"the server {address.host} cannot be found: {error.strerror}. Check its name"
            raise UserError(message, ExitCode.SERVER) from None
        except TlsError as error:
            raise UserError(f"{address}: {error}", ExitCode.SERVER) from None
        except OSError as error:
            raise UserError(
                f"no promisefs server at {address}: {error.strerror or error}. Start one with 'promisefsd serve DIR'",
                ExitCode.SERVER,
            ) from None
        except Refused as error:
            raise UserError(str(error), ExitCode.SERVER) from None
        except Aborted as refusal:
            raise UserError(f"{address} does not take this mount now ({refusal}): try again", ExitCode.SERVER) from None
        except trio.TooSlowError:
            raise UserError(f"the server at {address} does not answer", ExitCode.SERVER) from None

    async def find_root(self) -> tuple[Volume, Status]:
        """The volume to mount and the status of its root directory. Raise UserError."""
        try:
            with trio.fail_after(self._timeout_s):
                volume = await self.locator.by_name(self._source.volume)
                root, _ = await self.sessions[volume.server].call(FetchStatus(volume.root))
        except Aborted as refusal:
            if refusal.code == AbortCode.VNOVOL:
                message = f"{self._source.where} has no volume {self._source.volume!r}"
                raise UserError(message, ExitCode.SERVER) from None
            if refusal.code in _NO_TOKEN:
                message = f"{self._source.where}: {refusal.message}: you may not use it; 'promisefs login' first"
                raise UserError(message, ExitCode.SERVER) from None
            raise UserError(f"{self._source.where}: {refusal}", ExitCode.SERVER) from None
        except ServerUnavailable as error:
            raise UserError(str(error), ExitCode.SERVER) from None
        except trio.TooSlowError:
            message = (
                f"{self._source.where} does not say who has volume {self._source.volume!r}: not all servers answer"
            )
            raise UserError(message, ExitCode.SERVER) from None
        except FsError:
            message = f"two servers of {self._source.where} have the same volume: see the log"
            raise UserError(message, ExitCode.SERVER) from None
        return volume, root.entry.status

    def attach(self, cell: Cell, locks: LockManager) -> None:
        """From now on what servers call concerns the vnodes of this cell, and they are told what is locked."""
        for service in self.callbacks:
            service.cell = cell
            service.on_lock_answers = locks.answered
        for server, session in self.sessions.items():
            session.before_calls = partial(locks.reclaim, server)

    async def say_goodbye(self) -> None:
        async with trio.open_nursery() as nursery:
            for session in self.sessions.values():
                nursery.start_soon(session.say_goodbye)
