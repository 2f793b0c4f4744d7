"""The mount's side of its control socket: answers its owner and root, whatever the file server does."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from typing import Any

import trio

from promisefs_client.errors import ExitCode, UserError

from .control_socket import MAX_REQUEST_BYTES, BoundSocket, peer_of

log = logging.getLogger(__name__)

Command = Callable[[dict[str, Any]], Awaitable[Any]]
"""Takes the request's args, returns what JSON can carry. Raises UserError."""
Send = Callable[[Any], Awaitable[None]]
Stream = Callable[[dict[str, Any], Send], Awaitable[None]]
"""Takes the request's args, and sends answers for as long as who asked takes them. Raises UserError."""
UserCommand = Callable[[int, dict[str, Any]], Awaitable[Any]]
"""Takes the uid of who asks, too. Served to every user of the mount, each for themselves."""

MAX_CONNECTIONS = 64
"""Served at a time; further ones wait to be accepted."""
REQUEST_WAIT_S = 2.0
ANSWER_WAIT_S = 30.0
"""For who asked to take the answer."""
ACCEPT_RETRY_S = 1.0


class ControlServer:
    """`commands`, `streams` and `user_commands` may be added to as long as nobody has asked yet."""

    def __init__(self, device: str, *, shared: bool) -> None:
        """Listen from now on; answer once `serve` runs. `shared`: also to users that are not the owner.

        Raise UserError.
        """
        self.user_commands: dict[str, UserCommand] = {}
        self.commands: dict[str, Command] = {}
        self.streams: dict[str, Stream] = {}
        self._bound = [BoundSocket(device)]
        if shared:
            self._listen_for_others(device)

    def remove(self) -> None:
        """Let nobody find it any more: the mount has ended, its device number may be another's soon."""
        for bound in self._bound:
            bound.remove()

    def _listen_for_others(self, device: str) -> None:
        try:
            self._bound.append(BoundSocket(device, shared=True))
        except UserError as error:
            log.warning("other users of this mount cannot hand in tokens: %s", error)

    async def serve(self) -> None:
        """Answer until cancelled."""
        async with trio.open_nursery() as nursery:
            for bound in self._bound:
                nursery.start_soon(self._serve_on, bound)

    async def _serve_on(self, bound: BoundSocket) -> None:
        slots = trio.Semaphore(MAX_CONNECTIONS)
        listener = trio.SocketListener(trio.socket.from_stdlib_socket(bound.socket))
        async with listener, trio.open_nursery() as nursery:
            while True:
                await slots.acquire()
                nursery.start_soon(self._serve_one, await self._accept(listener), slots, bound.shared)

    @staticmethod
    async def _accept(listener: trio.SocketListener) -> trio.SocketStream:
        while True:
            try:
                return await listener.accept()
            except OSError as error:  # no descriptor is free
                log.warning("control: %s", error)
                await trio.sleep(ACCEPT_RETRY_S)

    async def _serve_one(self, stream: trio.SocketStream, slots: trio.Semaphore, shared: bool) -> None:
        try:
            async with stream:
                await self._answer(stream, shared)
        except (trio.BrokenResourceError, trio.TooSlowError) as error:
            log.debug("control: who asked went away: %r", error)
        except Exception:
            log.exception("control: a defect here")
        finally:
            slots.release()

    async def _answer(self, stream: trio.SocketStream, shared: bool) -> None:
        peer = peer_of(stream.socket)  # type: ignore[arg-type]  # trio's has getsockopt, too
        mine = peer.uid in (0, os.geteuid())
        if not mine and not shared:
            log.warning("control: process %d of uid %d may not ask", peer.pid, peer.uid)
            return
        commands: dict[str, Command] = {
            name: partial(command, peer.uid) for name, command in self.user_commands.items()
        }
        streams = self.streams if mine else {}
        if mine:
            commands |= self.commands
        with trio.fail_after(REQUEST_WAIT_S):
            await stream.send_all(_line({"commands": sorted({*commands, *streams})}))
            request = await _receive_line(stream)
        if request is None:
            return
        try:
            answer = {"result": await self._carry_out(request, stream, commands, streams)}
        except UserError as error:
            answer = {"error": str(error), "code": int(error.code)}
        with trio.fail_after(ANSWER_WAIT_S):
            await stream.send_all(_line(answer))

    @staticmethod
    async def _carry_out(
        line: bytes, stream: trio.SocketStream, commands: dict[str, Command], streams: dict[str, Stream]
    ) -> Any:
        try:
            request = json.loads(line)
            name, args = request["command"], request["args"]
            command = commands.get(name)
            send_many = None if command else streams[name]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError("the request was not understood", ExitCode.USAGE) from None
        try:
            if command is not None:
                return await command(args)
            assert send_many is not None
            await _while_listening(stream, partial(send_many, args))
        except (UserError, trio.BrokenResourceError):
            raise
        except Exception:
            log.exception("control: %s failed: a defect here", name)
            raise UserError(f"{name} failed in the mount's process, see its log") from None


async def _while_listening(stream: trio.SocketStream, send_many: Callable[[Send], Awaitable[None]]) -> None:
    """Have answers sent until there are no more, or who asked has closed the connection."""
    failure: Exception | None = None

    async def send(item: Any) -> None:
        await stream.send_all(_line({"item": item}))

    async with trio.open_nursery() as nursery:

        async def notice_end() -> None:
            with suppress(trio.BrokenResourceError):
                while await stream.receive_some():
                    pass  # nothing is expected any more
            nursery.cancel_scope.cancel()

        nursery.start_soon(notice_end)
        try:
            await send_many(send)
        except Exception as error:
            failure = error  # raised outside the nursery, which would wrap it
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure


def _line(message: dict[str, Any]) -> bytes:
    return json.dumps(message).encode() + b"\n"


async def _receive_line(stream: trio.SocketStream) -> bytes | None:
    """The first line; None if there is none, or if it is too long."""
    received = bytearray()
    while b"\n" not in received:
        more = await stream.receive_some()
        if not more or len(received) + len(more) > MAX_REQUEST_BYTES:
            return None
        received += more
    return bytes(received.partition(b"\n")[0])
