"""Which files processes may have mapped: the cell's `open_mmaps`. Core: no I/O; times are the client's clock's.

FUSE has no request for mmap. But a handle is released only after the last munmap, so the open handles are all that may
be mapped. A FLUSH comes with each close of a descriptor; one that no RELEASE follows says that a mapping, or a
duplicate of the descriptor, outlives the close. Mappings that nobody else would ask for are what a break, or the end of
a server's promises, has to reach first.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from typing import NamedTuple

from .vnode import Vnode
from .volumes import Volume

SETTLED_S = 1.0
"""An ordinary close is a FLUSH and, very soon, a RELEASE."""


class OpenFile(NamedTuple):
    vnode: Vnode
    opens: int
    """Handles."""
    outlives_close: bool
    """Each handle's descriptor was closed: surely only a mapping, or a duplicate of the descriptor, keeps it open."""


class OpenMmaps:
    """Open handles of regular files."""

    def __init__(self) -> None:
        self._handles: dict[Vnode, dict[int, float | None]] = {}  # handle -> time of its last FLUSH

    def opened(self, vnode: Vnode, handle: int) -> None:
        self._handles.setdefault(vnode, {})[handle] = None

    def flushed(self, vnode: Vnode, handle: int, now: float) -> None:
        """A descriptor of the handle is being closed."""
        self._handles[vnode][handle] = now

    def released(self, vnode: Vnode, handle: int) -> None:
        handles = self._handles[vnode]
        del handles[handle]
        if not handles:
            del self._handles[vnode]

    def __len__(self) -> int:
        """Open handles."""
        return sum(map(len, self._handles.values()))

    def files(self, now: float) -> Iterator[OpenFile]:
        """Every open file, once."""
        for vnode, handles in self._handles.items():
            outlives = all(flushed is not None and flushed + SETTLED_S <= now for flushed in handles.values())
            yield OpenFile(vnode, len(handles), outlives)

    def of_volumes(self, volumes: Container[Volume]) -> list[Vnode]:
        """Open files in these; first those of which a descriptor was closed and a handle is still there."""
        mine = [(vnode, handles) for vnode, handles in self._handles.items() if vnode.volume in volumes]
        mine.sort(key=lambda item: all(flushed is None for flushed in item[1].values()))
        return [vnode for vnode, _ in mine]
