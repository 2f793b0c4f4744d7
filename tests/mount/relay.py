"""A network between a mount and its server that can be cut: TCP connections passed on by threads of the test.

While it is cut nothing passes and nobody is told: connections stand, and new ones are accepted but lead nowhere. What
was on its way arrives when it is mended.
"""

from __future__ import annotations

import socket
import threading
from contextlib import suppress
from types import TracebackType

_POLL_S = 0.05


class Relay:
    """`with Relay(port) as relay:` mount with port=relay.port instead of `port`."""

    def __init__(self, port: int) -> None:
        self._to = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._whole = threading.Event()
        self._whole.set()
        self._ending = threading.Event()
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Relay:
        self._start(self._accept)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ending.set()
        self._whole.set()
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._threads[0].join()
        for each in self._sockets:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        for each in self._sockets:
            each.close()

    def cut(self) -> None:
        self._whole.clear()

    def mend(self) -> None:
        self._whole.set()

    def _start(self, function: object, *args: object) -> None:
        assert callable(function)
        thread = threading.Thread(target=function, args=args)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while not self._ending.is_set():
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            self._sockets.append(near)
            self._start(self._connect, near)

    def _connect(self, near: socket.socket) -> None:
        self._wait_whole()
        try:
            far = socket.create_connection(("127.0.0.1", self._to))
        except OSError:
            with suppress(OSError):
                near.shutdown(socket.SHUT_RDWR)
            return
        self._sockets.append(far)
        self._start(self._pass_on, near, far)
        self._pass_on(far, near)

    def _pass_on(self, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                self._wait_whole()
                target.sendall(data)
        for each in (source, target):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def _wait_whole(self) -> None:
        while not self._whole.wait(_POLL_S) and not self._ending.is_set():
            pass
