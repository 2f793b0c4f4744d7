"""Which host alone has changed the bytes of a file lately. Core; in memory only: what is not known here is not claimed.

A run is an unbroken sequence of data versions that one host made.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

MAX_RUNS = 65_536
"""Files of which a run is known; beyond it the one that was longest without a change is forgotten."""


class _Run(NamedTuple):
    host: int
    before: int  # the version that the run began on
    last: int


class Writers:
    def __init__(self) -> None:
        self._runs: OrderedDict[int, _Run] = OrderedDict()

    def changed(self, key: int, host: int, version: int) -> None:
        """`host` made this version of vnode `key`, out of the one before it."""
        run = self._runs.get(key)
        if run is not None and run.host == host and run.last == version - 1:
            self._runs[key] = run._replace(last=version)
        else:
            self._runs[key] = _Run(host, version - 1, version)
        self._runs.move_to_end(key)
        if len(self._runs) > MAX_RUNS:
            self._runs.popitem(last=False)

    def only(self, key: int, host: int, since: int, now: int) -> bool:
        """Whether `host` made every version after `since` up to `now`."""
        run = self._runs.get(key)
        return run is not None and run.host == host and run.before <= since and run.last == now
