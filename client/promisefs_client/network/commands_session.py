"""A connection for commands: of no mount, for logging in and for users and groups."""

from __future__ import annotations

import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import trio
from promisefs_protocol.abort import AbortCode, Aborted
from promisefs_protocol.address import Address
from promisefs_protocol.connection import NOBODY
from promisefs_protocol.identity_messages import Present
from promisefs_protocol.messages import PROTOCOL_VERSION, Hello, Role
from promisefs_protocol.tls import TlsError
from promisefs_protocol.transport import ConnectionLost, Peer, Reply

from promisefs_client.errors import ExitCode, UserError
from promisefs_client.identity.local_tokens import local_token
from promisefs_client.identity.saved_tokens import saved

from .session import Dial

ANSWER_WAIT_S = 30.0


class CommandsSession:
    """An open connection. `call` makes calls under the user's token, if there is one."""

    def __init__(self, peer: Peer, address: Address, store: bytes, tls: bool) -> None:
        self.address = address
        self.store = store
        self.tls = tls
        self._peer = peer
        self.own_token: bytes | None = None
        """That of whoever runs this command: saved by a login, or of a server that they run."""
        self._context = NOBODY

    async def present(self, token: bytes) -> None:
        self._context = (await self.call(Present(token))).context

    async def call(self, request: Any) -> Any:
        """Return the reply. Raise UserError with what the server says."""
        try:
            with trio.fail_after(ANSWER_WAIT_S):
                reply, _ = await self._peer.call(request, context=self._context)
        except Aborted as refusal:
            raise UserError(f"{self.address}: {refusal.message or refusal}", _code_of(refusal)) from None
        except (ConnectionLost, trio.TooSlowError):
            raise UserError(f"{self.address} does not answer", ExitCode.SERVER) from None
        return reply


def _code_of(refusal: Aborted) -> ExitCode:
    return ExitCode.SERVER if refusal.code == AbortCode.TOO_MANY else ExitCode.FAILURE


@asynccontextmanager
async def commands_session(address: Address, dial: Dial) -> AsyncIterator[CommandsSession]:
    """Connect to a server, without a token yet. Raise UserError."""
    failure: UserError | None = None
    async with trio.open_nursery() as nursery:
        try:
            stream = await _connect(address, dial)
            peer = Peer(stream, _serve_nothing, f"server {address}")
            nursery.start_soon(peer.run)
            session = CommandsSession(peer, address, b"", isinstance(stream, trio.SSLStream))
            description = f"{socket.gethostname()}: command of uid {os.geteuid()}"
            hello = Hello("promisefs", PROTOCOL_VERSION, PROTOCOL_VERSION, bytes(16), Role.COMMANDS, description)
            session.store = (await session.call(hello)).server
            token = saved(session.store)
            if token is not None and token.may_go_to(str(address), session.tls):
                session.own_token = token.token
            else:
                session.own_token = local_token(session.store, stream)
            yield session
        except UserError as error:
            failure = error  # raised outside the nursery, which would wrap it
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure


async def _connect(address: Address, dial: Dial) -> trio.abc.Stream:
    try:
        with trio.fail_after(ANSWER_WAIT_S):
            return await dial(address)
    except socket.gaierror as error:
        raise UserError(f"the server {address.host} cannot be found: {error.strerror}", ExitCode.SERVER) from None
    except TlsError as error:
        raise UserError(f"{address}: {error}", ExitCode.SERVER) from None
    except OSError as error:
        raise UserError(f"no promisefs server at {address}: {error.strerror or error}", ExitCode.SERVER) from None
    except trio.TooSlowError:
        raise UserError(f"the server at {address} does not answer", ExitCode.SERVER) from None


async def _serve_nothing(request: Any, bulk: bytes | None, context: int) -> Reply:
    raise Aborted(AbortCode.UNKNOWN_METHOD, "nothing is served here")
