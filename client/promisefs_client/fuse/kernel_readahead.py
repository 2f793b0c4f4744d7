"""How much the kernel asks for at a time of what is read in sequence.

It is 128 KiB unless somebody says otherwise in sysfs, which takes root. Each request costs the mount as much processor
time as a copy of that many bytes, so where it may the mount asks for the megabyte that one FetchData brings. Random
reads are not made larger by it; of a mapping it brings more around a page that is touched.
"""

from __future__ import annotations

import logging
from pathlib import Path

from promisefs_protocol.messages import MAX_BULK_BYTES

log = logging.getLogger(__name__)

SYSFS = Path("/sys/class/bdi")


def widen(device: str) -> None:
    """Set it for the mount of this device, major:minor. Where that is not allowed, nothing changes."""
    try:
        (SYSFS / device / "read_ahead_kb").write_text(str(MAX_BULK_BYTES >> 10))
    except OSError as error:
        log.debug("the kernel goes on reading ahead as it does: %s", error)
