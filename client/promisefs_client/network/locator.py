"""Finds out which server has a volume: by asking them all, at once.

A cell has no server that knows where everything is; each knows what it has itself. So a volume is certainly nowhere
only if every server was asked; while one could not be, the answer is that we do not know (ServerUnavailable).

Names of volumes are unique on a server, not in a cell. The first server in the order of the cell file that has one of
that name wins; a server that does not answer loses its turn after `ORDER_WAIT_S`, so that a mount does not wait for
servers that it does not need.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Sequence
from typing import NamedTuple

import trio
from promisefs_protocol.abort import AbortCode, Aborted
from promisefs_protocol.messages import GetEntryByID, GetEntryByName, VolumeEntry

from promisefs_client.errors import FsError, ServerUnavailable
from promisefs_client.fuse.requests import Interrupted
from promisefs_client.vnodes.volumes import TwoServersHaveIt, Volume, Volumes

from .servers import CallMark
from .session import ServerSession

log = logging.getLogger(__name__)

ORDER_WAIT_S = 0.5
"""How long the answer of a server that comes earlier in the cell file is waited for, once a later one has the name."""


class _Claim(NamedTuple):
    """A server says that it has the volume."""

    entry: VolumeEntry
    mark: CallMark


class Locator:
    """`sessions` in the order of the cell file."""

    def __init__(self, sessions: Sequence[ServerSession], volumes: Volumes) -> None:
        self._sessions = sessions
        self._volumes = volumes

    async def by_name(self, name: str) -> Volume:
        """The volume of that name. Raise Aborted(VNOVOL) if there is none, ServerUnavailable, FsError(ENODEV)."""
        return self._volumes.named(name) or await self._find(GetEntryByName(name))

    async def by_number(self, number: int) -> Volume:
        """The volume, where it is now, whatever we believed. Raises what `by_name` does."""
        return await self._find(GetEntryByID(number))

    async def _find(self, request: GetEntryByName | GetEntryByID) -> Volume:
        while True:
            answers = await self._ask_all(request)
            for answer, session in zip(answers, self._sessions, strict=True):
                if isinstance(answer, _Claim):
                    if not session.server.unreset_since(answer.mark):
                        break  # as void as a promise from before a reset
                    return self._learn(answer.entry, session)
            else:
                break
        for answer in answers:
            if isinstance(answer, Interrupted):
                raise answer
            if not (isinstance(answer, Aborted) and answer.code in (AbortCode.VNOVOL, AbortCode.VMOVED)):
                raise ServerUnavailable(f"{_words(request)} may be on a server that could not be asked: {answer}")
        raise Aborted(AbortCode.VNOVOL, f"no server has {_words(request)}")

    async def _ask_all(self, request: GetEntryByName | GetEntryByID) -> list[_Claim | Exception | None]:
        """What each server says; None of one whose answer was not waited for."""
        answers: list[_Claim | Exception | None] = [None] * len(self._sessions)

        async def ask(place: int, session: ServerSession) -> None:
            mark = session.server.begin_call(0.0)
            try:
                entry, _ = await session.call(request)
                answers[place] = _Claim(entry, mark)
            except (Aborted, ServerUnavailable) as refusal:
                answers[place] = refusal
            finally:
                session.server.end_call(mark)
            found = [isinstance(answer, _Claim) for answer in answers]
            if any(found):
                scope = nursery.cancel_scope
                all_before_answered = None not in answers[: found.index(True)]
                scope.deadline = min(scope.deadline, trio.current_time() + (0 if all_before_answered else ORDER_WAIT_S))

        async with trio.open_nursery() as nursery:
            for place, session in enumerate(self._sessions):
                nursery.start_soon(ask, place, session)
        return answers

    def _learn(self, entry: VolumeEntry, session: ServerSession) -> Volume:
        try:
            return self._volumes.learn(entry.volume, entry.name, entry.root, session.server)
        except TwoServersHaveIt as mistake:
            log.error("%s", mistake)
            raise FsError(errno.ENODEV) from None


def _words(request: GetEntryByName | GetEntryByID) -> str:
    return f"volume {request.name!r}" if isinstance(request, GetEntryByName) else f"volume {request.volume}"
