"""`promisefs status --mmaps`: the files that are open or may be mapped, with the processes that have them."""

from __future__ import annotations

from typing import Any

from rich.table import Table
from rich.text import Text

from .control_client import ask
from .mounts import MountEntry
from .proc_files import User, find_users
from .status_view import place_of, printable

MMAPS_WAIT_S = 20.0
"""Thousands of files take a while to list."""


def fetch_mmaps(entry: MountEntry) -> dict[str, Any]:
    """Ask the process behind a mount, and look for the users. Raise UserError."""
    report: dict[str, Any] = ask(entry, "mmaps", wait_s=MMAPS_WAIT_S)
    users = find_users(entry.device)
    for file in report["files"]:
        found = users.by_inode.get(file["inode"], [])
        file["mapped"] = any(user.mappings for user in found)
        file["processes"] = [user._asdict() for user in found]
    return {**place_of(entry), **report, "hidden_processes": users.hidden}


def mmaps_table(report: dict[str, Any]) -> Table:
    title = f"{printable(report['mountpoint'])}: {len(report['files']) + report['omitted']} files open or mapped"
    notes = []
    if report["omitted"]:
        notes.append(f"{report['omitted']} more files")
    if report["hidden_processes"]:
        notes.append(f"{report['hidden_processes']} processes could not be looked into: ask as root")
    table = Table(box=None, title=title, title_justify="left", caption="; ".join(notes), caption_justify="left")
    for column in ("path", "fid", "opens", "", "processes"):
        table.add_column(column, overflow="fold")
    for file in report["files"]:
        users = ", ".join(_describe(User(**process)) for process in file["processes"])
        table.add_row(
            Text(printable(file["path"])), file["fid"], str(file["opens"]), _marks(file), Text(users or "none seen")
        )
    return table


def _marks(file: dict[str, Any]) -> str:
    held = "mapped" if file["mapped"] else "closed, but held" if file["outlives_close"] else ""
    return ", ".join(filter(None, [held, "dirty" if file["dirty"] else "", "deleted" if file["deleted"] else ""]))


def _describe(user: User) -> str:
    ways = [f"{user.mappings} mapped"] if user.mappings else []
    ways += [f"{user.descriptors} open"] if user.descriptors else []
    return f"{user.command} {user.pid} ({', '.join(ways)})"
