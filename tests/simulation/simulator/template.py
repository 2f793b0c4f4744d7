"""The store that every history begins with: made once in a process, then copied."""

from __future__ import annotations

import functools
import shutil
import stat
import tempfile
import weakref
from pathlib import Path

from promisefs_server.store import Store
from promisefs_server.volumes import VNODE_BITS

from .plan import DIRECTORIES, FILE_BYTES, FILES, LOG
from .plan import Path as CellPath
from .world import EPOCH_NS, simulated

MEMORY = Path("/dev/shm")
VOLUME = 1
"""The root volume of the first server."""
FIRST_VNODE = 2
"""After the root directory's."""


def scratch_folder(prefix: str) -> Path:
    """A new folder, in memory where that is possible."""
    return Path(tempfile.mkdtemp(prefix=prefix, dir=MEMORY if MEMORY.is_dir() else None))


@functools.cache
def _template() -> Path:
    folder = scratch_folder("simulation-template-")
    weakref.finalize(_template, shutil.rmtree, folder, ignore_errors=True)
    with simulated(0):
        _fill(folder / "store")
    return folder / "store"


def _fill(folder: Path) -> None:
    store = Store.open(folder, EPOCH_NS)
    volume = store.volumes.by_name("root")
    store.volumes.reserve(volume.volume)
    with store.database.transaction():
        root = store.vnodes.find(volume.root)
        assert root is not None
        folders = {}
        for (name,) in DIRECTORIES:
            root, made = store.directories.create(root, name, stat.S_IFDIR | 0o755, 0, 0, None, EPOCH_NS)
            folders[name] = made
        for parent, name in (*FILES, LOG):
            folders[parent], file = store.directories.create(
                folders[parent], name, stat.S_IFREG | 0o644, 0, 0, None, EPOCH_NS
            )
            if (parent, name) != LOG:
                store.vnodes.update(file._replace(size=FILE_BYTES, sparse=1, data_version=2))
    store.close(clean=True)


def prepare_template() -> None:
    """Make the template now, if it is not there: while no history runs, whose chances it would change."""
    _template()


def copy_template(to: Path) -> None:
    shutil.copytree(_template(), to, ignore=shutil.ignore_patterns("lock", "*-shm"))


def initial_inodes() -> dict[CellPath, int]:
    """The inode numbers that clients give to what every history begins with."""
    paths = (*DIRECTORIES, *FILES, LOG)
    return {path: VOLUME << VNODE_BITS | FIRST_VNODE + i for i, path in enumerate(paths)}
