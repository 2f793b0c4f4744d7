"""A network in memory: connections with delay, links that fail, machines that vanish.

A connection is two pipes. What is sent comes out in order, each piece after a delay of its own; connections do not keep
order among each other. A link joins a client's machine with a server's; it may be blocked in either direction, for
a while: what is under way then waits, as TCP repeats it, and comes out when the block ends.

When a connection is cut, what has not come out is lost, and each end notices at a time of its own.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Awaitable, Callable

import trio

from .world import World

WINDOW_BYTES = 1 << 18
"""So much may be under way in one direction before a sender waits."""

LONGEST_NOTICE_S = 0.5
"""After a cut each end notices within this."""
LONGEST_DELAY_S = 1.7
"""Of what is sent, while nothing is blocked."""

Accept = Callable[[trio.abc.Stream, str], None]


class _Pipe:
    """One direction of a connection."""

    def __init__(self, link: Link, towards_server: bool) -> None:
        self.link = link
        self.towards_server = towards_server
        self.lag_s = link.new_lag_s()
        """It is slower than its link by so much: what is sent on different connections comes out in any order."""
        self.queue: deque[tuple[float, bytes]] = deque()
        self.queued_bytes = 0
        self.last_at_s = 0.0
        self.ended_at_s = math.inf
        """The receiver sees the end then, after what comes out before."""
        self.broken_at_s = math.inf
        """The receiver sees an error then, whatever was sent."""
        self.stalled_to_s = 0.0
        """Nothing comes out before this."""
        self.lost = False
        """What is sent goes nowhere."""
        self.changed = trio.Event()

    def wake(self) -> None:
        self.changed.set()
        self.changed = trio.Event()

    def put(self, data: bytes) -> None:
        if self.lost:
            return
        at_s = max(self.last_at_s, self.link.arrival_s() + self.lag_s)
        self.last_at_s = at_s
        self.queue.append((at_s, data))
        self.queued_bytes += len(data)
        self.wake()


class Link:
    """What lies between one client and one server."""

    def __init__(self, network: Network, client: str, server: str) -> None:
        self._network = network
        self._random = network.world.random
        self.client = client
        self.server = server
        self.latency_s = self._random.choice((0.0001, 0.0003, 0.002, 0.02))
        self.blocked_up_to_s = 0.0
        """Nothing comes out at the server before this."""
        self.blocked_down_to_s = 0.0
        """Nothing comes out at the client before this."""
        self.connections: list[_Connection] = []

    def arrival_s(self) -> float:
        chance = self._random.random()
        delay_s = self.latency_s * (0.5 + self._random.random())
        if chance < 0.04:
            delay_s += self._random.random() * 0.1
        elif chance < 0.05:
            delay_s += self._random.random() * 1.5
        return self._network.world.now_s + delay_s

    def new_lag_s(self) -> float:
        return self._random.random() * self._random.choice((0.0, 0.0, 0.0, 0.01, 0.05, 0.15))

    def blocked_to_s(self, towards_server: bool) -> float:
        return self.blocked_up_to_s if towards_server else self.blocked_down_to_s

    def block(self, seconds: float, up: bool, down: bool) -> None:
        until_s = self._network.world.now_s + seconds
        if up:
            self.blocked_up_to_s = max(self.blocked_up_to_s, until_s)
        if down:
            self.blocked_down_to_s = max(self.blocked_down_to_s, until_s)

    def unblock(self) -> None:
        now_s = self._network.world.now_s
        self.blocked_up_to_s = min(self.blocked_up_to_s, now_s)
        self.blocked_down_to_s = min(self.blocked_down_to_s, now_s)
        for connection in self.connections:
            connection.stall_down(0.0)
            connection.wake()

    def stall(self, callbacks: bool, seconds: float) -> _Connection | None:
        """Nothing comes out at the client of one connection for so long. Return that, if there is any.

        A client makes that for callbacks first.
        """
        if not self.connections:
            return None
        connection = self.connections[0 if callbacks else -1]
        connection.stall_down(self._network.world.now_s + seconds)
        return connection

    def cut(self, only: _Connection | None = None) -> None:
        """Every connection breaks, or `only` one; each end notices at its own time."""
        for connection in [c for c in self.connections if only in (None, c)]:
            connection.cut(self._random.random() * LONGEST_NOTICE_S, self._random.random() * LONGEST_NOTICE_S)
            self.connections.remove(connection)

    def linger(self, seconds: float) -> None:
        """Every connection breaks at the client; what that had sent comes out at the server so much later."""
        for connection in self.connections:
            connection.linger(seconds, self._random.random() * LONGEST_NOTICE_S)
        self.connections.clear()


class _End(trio.abc.Stream):
    """What one machine has of a connection."""

    def __init__(self, world: World, inbound: _Pipe, outbound: _Pipe) -> None:
        self._world = world
        self._in = inbound
        self._out = outbound
        self._closed = False

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        if self._closed:
            raise trio.ClosedResourceError
        if self._in.broken_at_s <= self._world.now_s:
            raise trio.BrokenResourceError
        self._out.put(bytes(data))
        while self._out.queued_bytes > WINDOW_BYTES and not self._out.lost:
            await self._out.changed.wait()
            if self._closed:
                raise trio.ClosedResourceError

    async def wait_send_all_might_not_block(self) -> None:
        await trio.lowlevel.checkpoint()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        await trio.lowlevel.checkpoint()
        pipe = self._in
        while True:
            if self._closed:
                raise trio.ClosedResourceError
            now_s = self._world.now_s
            if pipe.broken_at_s <= now_s:
                raise trio.BrokenResourceError
            ready_at_s = pipe.ended_at_s
            if pipe.queue:
                ready_at_s = min(ready_at_s, pipe.queue[0][0])
            ready_at_s = max(ready_at_s, pipe.link.blocked_to_s(pipe.towards_server), pipe.stalled_to_s)
            if ready_at_s <= now_s:
                return self._take(pipe)
            with trio.move_on_at(min(ready_at_s, pipe.broken_at_s)):
                await pipe.changed.wait()

    def _take(self, pipe: _Pipe) -> bytes:
        self._world.deliveries += 1
        if not pipe.queue:
            return b""
        _, data = pipe.queue.popleft()
        pipe.queued_bytes -= len(data)
        pipe.wake()
        return data

    async def aclose(self) -> None:
        self._hang_up()
        await trio.lowlevel.checkpoint()

    def _hang_up(self) -> None:
        if self._closed:
            return
        self._closed = True
        if not self._out.lost:
            self._out.lost = True
            self._out.ended_at_s = max(self._out.last_at_s, self._out.link.arrival_s())
            self._out.wake()
        self._in.lost = True
        self._in.wake()


class _Connection:
    def __init__(self, link: Link, world: World) -> None:
        up, down = _Pipe(link, True), _Pipe(link, False)
        self._up, self._down = up, down
        self._world = world
        self.at_client = _End(world, down, up)
        self.at_server = _End(world, up, down)

    def cut(self, client_after_s: float, server_after_s: float) -> None:
        now_s = self._world.now_s
        for pipe, after_s in ((self._down, client_after_s), (self._up, server_after_s)):
            pipe.lost = True
            pipe.queue.clear()
            pipe.queued_bytes = 0
            pipe.ended_at_s = math.inf
            pipe.broken_at_s = min(pipe.broken_at_s, now_s + after_s)
            pipe.wake()

    def linger(self, seconds: float, client_after_s: float) -> None:
        now_s = self._world.now_s
        self._up.stalled_to_s = now_s + seconds
        self._down.lost = True
        self._down.queue.clear()
        self._down.queued_bytes = 0
        self._down.broken_at_s = min(self._down.broken_at_s, now_s + client_after_s)
        self.wake()

    def wake(self) -> None:
        self._up.wake()
        self._down.wake()

    def stall_down(self, to_s: float) -> None:
        self._down.stalled_to_s = to_s

    def vanish_client(self, after_s: float) -> None:
        """The client's machine is gone: what it sent still arrives; the server may or may not ever notice."""
        self._up.lost = True
        self._up.broken_at_s = self._world.now_s + after_s
        self._down.lost = True
        self._down.broken_at_s = 0.0
        self._up.wake()
        self._down.wake()


class Network:
    def __init__(self, world: World) -> None:
        self.world = world
        self._links: dict[tuple[str, str], Link] = {}
        self._listening: dict[str, Accept] = {}
        self.local_tokens: dict[bytes, bytes] = {}
        """Of servers, by their stores: all clients are mounts of whoever runs the servers, on one machine."""

    def link(self, client: str, server: str) -> Link:
        key = (client, server)
        if key not in self._links:
            self._links[key] = Link(self, client, server)
        return self._links[key]

    def links(self) -> list[Link]:
        return list(self._links.values())

    def listen(self, server: str, accept: Accept) -> None:
        self._listening[server] = accept

    def server_gone(self, server: str, *, suddenly: bool) -> None:
        """Nobody listens any more; `suddenly`: its connections break, and what it had not sent out is lost."""
        self._listening.pop(server, None)
        if suddenly:
            for link in self._links.values():
                if link.server == server:
                    for connection in link.connections:
                        connection.cut(self.world.random.random() * 0.05, 0.0)
                    link.connections.clear()

    def client_gone(self, client: str) -> None:
        noticed_s = self.world.random.choice((0.01, 1.0, math.inf))
        for link in self._links.values():
            if link.client == client:
                for connection in link.connections:
                    connection.vanish_client(noticed_s)
                link.connections.clear()

    def dialler(self, client: str) -> Callable[[str], Awaitable[trio.abc.Stream]]:
        """How a client's machine connects to a server. Raises OSError."""

        async def dial(server: str) -> trio.abc.Stream:
            link = self.link(client, server)
            # A round trip: both directions have to be open at some time.
            await trio.sleep_until(max(link.arrival_s(), link.blocked_up_to_s))
            await trio.sleep_until(max(link.arrival_s(), link.blocked_down_to_s))
            accept = self._listening.get(server)
            if accept is None:
                raise ConnectionRefusedError(f"nobody listens at {server}")
            connection = _Connection(link, self.world)
            link.connections.append(connection)
            accept(connection.at_server, client)
            return connection.at_client

        return dial
