"""Telling the service manager (systemd) what a daemon is about, as sd_notify(3) does."""

from __future__ import annotations

import logging
import os
import socket

log = logging.getLogger(__name__)

READY = "READY=1"
STOPPING = "STOPPING=1"


def notify(*states: str) -> None:
    """Send states if there is a manager that wants to know. Never fails: it is said in the log."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
            manager.connect(address)
            manager.send("\n".join(states).encode())
    except OSError as error:
        log.warning("cannot tell the service manager that %s: %s", " ".join(states), error.strerror)
