"""What goes wrong in a history."""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from .plan import Fault

if TYPE_CHECKING:
    from .run import Cell


class Faults:
    def __init__(self, cell: Cell) -> None:
        self._cell = cell

    async def inject(self, number: int, fault: Fault) -> None:
        await trio.sleep(fault.at_s)
        self._cell.history.note("fault", f"{fault.kind}{fault.args}")
        await getattr(self, "_" + fault.kind)(*fault.args)

    async def heal(self) -> None:
        """Nothing goes wrong from now on."""
