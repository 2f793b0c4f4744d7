"""Which server of which cell a store belongs to. Noted in the store when it is made, and never changed."""

from __future__ import annotations

from dataclasses import dataclass

from promisefs_protocol.cell_file import CellFile


@dataclass(frozen=True, slots=True)
class Membership:
    cell: str
    """The cell's name; empty for a server alone."""
    number: int
    makes_root: bool
    """Whether the volume "root" is made with the store: one server of a cell does that."""

    def __str__(self) -> str:
        return f"server {self.number} of the cell {self.cell!r}" if self.cell else "a server without a cell"


ALONE = Membership("", 0, True)


def membership_in(cell: CellFile, number: int) -> Membership:
    """As server `number` of the cell, which the file must have."""
    return Membership(cell.name, number, number == min(server.number for server in cell.servers))
