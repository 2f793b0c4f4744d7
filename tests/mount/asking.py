"""What a mount says of itself, asked as `promisefs status` asks, but from the test's own process.

A command that is started inherits descriptors and closes them; each such close is a flush, and a flush stores.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from promisefs_client.commands.mounts import find_mount
from promisefs_client.commands.status_view import fetch_status


def status_of(mountpoint: Path) -> dict[str, Any]:
    return fetch_status(find_mount(str(mountpoint)))
