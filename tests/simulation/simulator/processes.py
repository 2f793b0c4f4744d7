"""Processes on a client's machine: they make the system calls of a plan, and a history records them."""

from __future__ import annotations

import os
import stat

import trio

from .client_machine import ClientMachine
from .history import Call, History
from .kernel_inodes import OpenFile
from .kernel_pages import BusError
from .layout import Path
from .plan import LOOK_BYTES, WATCH, Step

WATCH_LIMIT_S = 0.5


class Process:
    """One thread of control with one open file and one mapping at a time."""

    def __init__(self, name: str, machine: ClientMachine, history: History) -> None:
        self.name = name
        self._machine = machine
        self._history = history
        self._file: OpenFile | None = None
        self._mapping: OpenFile | None = None

    @property
    def has_file(self) -> bool:
        return self._file is not None

    async def run(self, steps: tuple[Step, ...]) -> None:
        for step in steps:
            if step.delay_s == WATCH:
                with trio.move_on_after(WATCH_LIMIT_S):
                    await self._history.something_told()
            elif step.delay_s:
                await trio.sleep(step.delay_s)
            await self.perform(step)
        await self.finish()

    async def finish(self) -> None:
        if self._mapping is not None:
            await self.perform(Step("unmap", (), 0.0))
        if self._file is not None:
            await self.perform(Step("close", (), 0.0))

    async def perform(self, step: Step) -> Call | None:
        """Make one system call, if it can be made: some need an open file or a mapping."""
        if step.kind == "look":
            await self._look(*step.args)
            return None
        if step.kind == "publish":
            await self.perform(Step("write", step.args, 0.0))
            return await self.perform(Step("fsync", (), 0.0))
        if step.kind in _NEED_FILE and self._file is None:
            return None
        if step.kind == "unmap" and self._mapping is None:
            return None
        if step.kind in _OPENING and self._file is not None:
            await self.perform(Step("close", (), 0.0))
        call = self._history.begin(self._machine.name, self.name, step.kind, step.args)
        if step.kind in _NEED_FILE:
            assert self._file is not None
            call.ino = self._file.inode.ino
        try:
            await getattr(self, "_" + step.kind)(call, *step.args)
        except OSError as error:
            call.error = str(error.strerror)
        self._history.end(call)
        self._machine.check_invariants()
        return call

    async def _look(self, path: Path) -> None:
        """Read all of a file through a descriptor of its own."""
        other = Process(self.name, self._machine, self._history)
        await other.perform(Step("reopen", (path, os.O_RDONLY), 0.0))
        await other.perform(Step("read", (0, LOOK_BYTES), 0.0))
        await other.perform(Step("close", (), 0.0))

    # Files

    async def _reopen(self, call: Call, path: Path, flags: int) -> None:
        self._file = await self._machine.names.open(path, flags)
        call.ino = self._file.inode.ino

    async def _create(self, call: Call, path: Path) -> None:
        self._file = await self._machine.names.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        call.ino = self._file.inode.ino

    async def _close(self, call: Call) -> None:
        file, self._file = self._file, None
        assert file is not None
        try:
            await self._machine.pages.flush(file)
        finally:
            self._machine.names.put(file)

    async def _read(self, call: Call, offset: int, length: int) -> None:
        assert self._file is not None
        call.result = await self._machine.pages.read(self._file, offset, length)

    async def _write(self, call: Call, offset: int, length: int, value: int) -> None:
        assert self._file is not None
        call.result = await self._machine.pages.write(self._file, offset, bytes((value,)) * length)

    async def _append(self, call: Call, length: int, value: int) -> None:
        assert self._file is not None
        call.result = await self._machine.pages.write(self._file, None, bytes((value,)) * length)

    async def _fsync(self, call: Call) -> None:
        assert self._file is not None
        await self._machine.pages.sync(self._file)

    async def _truncate(self, call: Call, size: int) -> None:
        assert self._file is not None
        await self._machine.names.truncate(self._file, size)

    async def _punch(self, call: Call, offset: int, length: int) -> None:
        assert self._file is not None
        await self._machine.pages.punch(self._file, offset, length)

    # Mappings

    def _mapped(self, call: Call) -> OpenFile:
        assert self._file is not None
        if self._mapping is None:
            self._mapping = self._file
            self._mapping.users += 1
        call.ino = self._mapping.inode.ino
        return self._mapping

    async def _load(self, call: Call, offset: int, length: int) -> None:
        mapping = self._mapped(call)
        try:
            call.result = await self._machine.pages.load(mapping, offset, length)
        except BusError as error:
            if isinstance(error.__cause__, OSError):
                raise error.__cause__ from None
            call.result = b""  # beyond the end

    async def _store(self, call: Call, offset: int, length: int, value: int) -> None:
        mapping = self._mapped(call)
        try:
            await self._machine.pages.store(mapping, offset, bytes((value,)) * length)
        except BusError as error:
            call.error = str(error.__cause__.strerror) if isinstance(error.__cause__, OSError) else "SIGBUS"

    async def _msync(self, call: Call) -> None:
        await self._machine.pages.sync(self._mapped(call))

    async def _unmap(self, call: Call) -> None:
        assert self._mapping is not None
        call.ino = self._mapping.inode.ino
        mapping, self._mapping = self._mapping, None
        await self._machine.pages.write_back_dirty(mapping.inode)
        self._machine.names.put(mapping)

    # Names

    async def _stat(self, call: Call, path: Path) -> None:
        attributes = await self._machine.names.stat(path)
        call.ino = attributes.ino
        call.result = (attributes.size, stat.S_IMODE(attributes.mode))

    async def _list(self, call: Call, path: Path) -> None:
        call.result = await self._machine.names.listdir(path)

    async def _unlink(self, call: Call, path: Path) -> None:
        call.ino = await self._machine.names.unlink(path)

    async def _rename(self, call: Call, old: Path, new: Path) -> None:
        call.ino = await self._machine.names.rename(old, new)

    async def _link(self, call: Call, old: Path, new: Path) -> None:
        call.ino = await self._machine.names.link(old, new)

    async def _chmod(self, call: Call, path: Path, mode: int) -> None:
        call.ino = await self._machine.names.chmod(path, mode)


_OPENING = {"reopen", "create"}
_NEED_FILE = {"close", "read", "write", "append", "fsync", "truncate", "punch", "load", "store", "msync"}
