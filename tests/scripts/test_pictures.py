"""scripts/bench --plot: pictures of what was measured, or one line that says what is missing."""

from __future__ import annotations

import importlib.util
import struct
from pathlib import Path

import pytest
from bench_lib import pictures
from bench_lib.visible import Visibility

HAS_MATPLOTLIB = importlib.util.find_spec("matplotlib") is not None
RATES = {"stat-warm": {"local": 500_000.0, "promisefs": 450_000.0, "sshfs": 1.5}, "unlink": {"promisefs": 3.0}}
SEEN = Visibility("mmap", 1.0, 3.0, 0, 3, 2.0, (0.5, 1.0, 3.0))


def size_of(picture: Path) -> tuple[int, int]:
    head = picture.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", head[16:24])
    return width, height


def test_pictures_or_what_is_missing(tmp_path: Path) -> None:
    if not HAS_MATPLOTLIB:
        with pytest.raises(pictures.PlotError, match=r"setup\.sh --plot"):
            pictures.check_matplotlib()
        return
    pictures.check_matplotlib()
    pictures.draw(RATES, {"mmap": {"local": SEEN, "promisefs": SEEN}}, [("mmap", "sshfs")], tmp_path)
    for name in (pictures.SPEED, pictures.VISIBLE):
        width, height = size_of(tmp_path / name)
        assert width == 900 and height > 100
        assert (tmp_path / name).stat().st_size < 200_000
