"""Runs one history from a plan and has it checked."""

from __future__ import annotations

import logging
import shutil
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import trio
from promisefs_client.identity.key import Key
from promisefs_client.network.session import ServerSession
from promisefs_protocol.transport import Reply

from .aftermath import leave_nothing
from .checker import check
from .client_machine import ClientMachine
from .faults import Faults
from .history import History
from .network import Network
from .observer import FRESH, check_agreement, observe_everything
from .plan import Plan
from .processes import Process
from .server_machine import ServerMachine
from .template import scratch_folder, template
from .world import World, simulated

LONGEST_S = 600.0
"""Simulated seconds after which a history counts as stuck."""
SETTLE_S = 2.0


@dataclass(slots=True)
class Outcome:
    plan: Plan
    problems: list[str] = field(default_factory=list)
    timeline: str = ""
    calls: int = 0
    simulated_s: float = 0.0

    @property
    def failed(self) -> bool:
        return bool(self.problems)


class _Defects(logging.Handler):
    """Log records that say that a defect was met."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info or record.levelno >= logging.CRITICAL:
            trace = "".join(traceback.format_exception(*record.exc_info)) if record.exc_info else ""
            self.found.append(f"{record.name}: {record.getMessage()}\n{trace}")


@contextmanager
def _logs() -> Iterator[_Defects]:
    handler = _Defects()
    loggers = [logging.getLogger(name) for name in ("promisefs_client", "promisefs_server", "promisefs_protocol")]
    before = [(logger.propagate, logger.level) for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.propagate = False
        logger.setLevel(logging.WARNING)
    try:
        yield handler
    finally:
        for logger, (propagate, level) in zip(loggers, before, strict=True):
            logger.removeHandler(handler)
            logger.propagate = propagate
            logger.setLevel(level)


class Cell:
    """The machines of one history."""

    def __init__(self, plan: Plan, world: World, history: History) -> None:
        self.plan = plan
        self.world = world
        self.history = history
        self.network = Network(world)
        self.folder = scratch_folder("simulation-")
        self.servers: list[ServerMachine] = []
        self.clients: list[ClientMachine] = []
        self.nursery: trio.Nursery
        self.trace = False
        self.template = template(plan.layout)
        self.violations: list[str] = []
        """Invariants of servers that did not hold, and what is left in their stores at the end."""
        self._checked_after = -1
        world.clock.before_time_passes = self._check_servers
        history.after_call = self._check_stores

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            self.nursery = nursery
            await self._start()
            faults = Faults(self)
            async with trio.open_nursery() as working:
                for fault in self.plan.faults:
                    working.start_soon(faults.inject, fault)
                for number, (client, steps) in enumerate(self.plan.processes):
                    machine = self.clients[client]
                    process = Process(f"{machine.name}/p{number}", machine, self.history)
                    working.start_soon(machine.run_process, process, steps)
            await faults.heal()
            self.history.note("all", "all processes have ended; everything is looked at")
            await self._settle()
            self.clients.append(await self.start_client(FRESH))
            await observe_everything(self)
            self.violations += await leave_nothing(self)
            nursery.cancel_scope.cancel()

    def _check_servers(self) -> None:
        """Nothing was said to anybody since the last time: no server did anything but wait."""
        if self.world.deliveries == self._checked_after:
            return
        self._checked_after = self.world.deliveries
        for server in self.servers:
            if server.server is not None and not self.violations:
                try:
                    server.server.check_invariants()
                except AssertionError:
                    self.history.note(server.name, "an invariant does not hold")
                    self.violations.append(f"invariant: of {server.name}:\n{traceback.format_exc()}")

    def _check_stores(self) -> None:
        for server in self.servers:
            if server.server is not None:
                server.server.check_store_invariants()

    async def _settle(self) -> None:
        """Wait until all have found their servers again, nothing is dirty any more, and all is calm."""
        while any(client.alive and not client.calm for client in self.clients):  # noqa: ASYNC110 (simulated)
            await trio.sleep(SETTLE_S)
        await trio.sleep(SETTLE_S)

    async def _start(self) -> None:
        layout = self.plan.layout
        for number, name in enumerate(layout.names):
            folder = self.folder / name
            self.template.copy(name, folder / "0")
            server = ServerMachine(number, layout, folder, self.network, self.nursery, self.plan.lease_s)
            await server.start()
            self.servers.append(server)
        for number in range(self.plan.clients):
            self.clients.append(await self.start_client(f"c{number}"))

    async def start_client(self, name: str) -> ClientMachine:
        plan = self.plan
        client = ClientMachine(
            name, self.network, self.history, self.nursery, plan.layout.source, plan.timeout_s, plan.rate_of(name)
        )
        await client.start()
        client.core.extension = plan.extension
        if self.trace:
            self._trace(client)
        return client

    def _trace(self, client: ClientMachine) -> None:
        """Have the timeline show the kernel's requests, calls to servers and their callbacks too."""
        client.core.trace = lambda text: self.history.note(f"{client.name} kernel", text)
        for session in client.connections.sessions.values():
            self._trace_session(client.name, session)

    def _trace_session(self, client: str, session: ServerSession) -> None:
        server = session.address.host
        serve = session._on_callback

        async def traced(request: Any, bulk: bytes | None, context: int) -> Reply:
            self.history.note(f"{server} calls", f"{client}: {request} ...")
            reply = serve(request, bulk, context)
            if not isinstance(reply, tuple):
                reply = await reply
            self.history.note(f"{server} calls", f"{client}: {request} = {reply[0]}")
            return reply

        session._on_callback = traced
        call = session.call

        async def traced_call(
            request: Any, bulk: Any = None, timeout_s: float | None = None, key: Key | None = None
        ) -> Any:
            self.history.note(f"{client} asks", f"{server}: {request} ...")
            try:
                reply = await call(request, bulk, timeout_s, key)
            except BaseException as error:
                text = "cancelled" if isinstance(error, trio.Cancelled) else repr(error)
                self.history.note(f"{client} asks", f"{server}: {request}: {text}")
                raise
            self.history.note(f"{client} asks", f"{server}: {request} = {reply[0]}")
            return reply

        session.call = traced_call  # type: ignore[method-assign]


def run_history(plan: Plan, *, trace: bool = False) -> Outcome:
    """Run and check one history. Leaves nothing behind."""
    outcome = Outcome(plan)
    with _logs():
        template(plan.layout)
    with simulated(plan.seed) as world, _logs() as defects:
        history = History(world)
        cell = Cell(plan, world, history)
        cell.trace = trace
        try:
            outcome.problems += _run_bounded(cell)
        finally:
            shutil.rmtree(cell.folder, ignore_errors=True)
        outcome.problems += cell.violations
        outcome.problems += [f"a defect was met: {text}" for text in defects.found]
        outcome.problems += check(history, plan, cell.template.initial)
        outcome.problems += check_agreement(history)
        outcome.timeline = history.text()
        outcome.calls = len(history.calls)
        outcome.simulated_s = world.now_s - 1000.0
    return outcome


def _run_bounded(cell: Cell) -> list[str]:
    async def main() -> bool:
        with trio.move_on_after(LONGEST_S) as scope:
            await cell.run()
        return scope.cancelled_caught

    try:
        stuck = trio.run(main, clock=cell.world.clock)
    except BaseExceptionGroup as group:
        if group.subgroup(KeyboardInterrupt) is not None:
            raise KeyboardInterrupt from None
        return ["".join(traceback.format_exception(group))]
    except (AssertionError, Exception) as error:
        return ["".join(traceback.format_exception(error))]
    if stuck:
        unfinished = [str(call) for call in cell.history.calls if call.end == float("inf")]
        return [f"stuck: no end after {LONGEST_S:g} simulated seconds; under way: {unfinished}"]
    return []
