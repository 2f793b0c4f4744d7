"""Which deleted files a server is to be told were closed."""

from __future__ import annotations

import pytest
from promisefs_client.network import closings
from promisefs_client.network.closings import Closings
from promisefs_protocol.ids import Fid


def fid(number: int, volume: int = 1) -> Fid:
    return Fid(volume, number, 1)


def test_in_order_and_by_volume_until_told() -> None:
    owed = Closings()
    assert owed.add([fid(1), fid(2), fid(9, volume=2), fid(3), fid(1)]) == 0
    assert len(owed) == 4
    assert owed.owed(1, 2) == (fid(1), fid(2))
    owed.told([fid(1), fid(2), fid(77)])
    assert owed.owed(1, 10) == (fid(3),)
    assert owed.owed(2, 10) == (fid(9, volume=2),)
    owed.told([fid(3)])
    assert owed.owed(1, 10) == ()
    assert len(owed) == 1


def test_a_bound_on_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(closings, "MAX_OWED", 3)
    owed = Closings()
    assert owed.add([fid(number) for number in range(1, 6)]) == 2
    assert owed.owed(1, 10) == (fid(3), fid(4), fid(5))
    assert len(owed) == 3
