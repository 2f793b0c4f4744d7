"""Python's cyclic garbage collector, set for a daemon."""

from __future__ import annotations

import gc

YOUNG_OBJECTS = 10_000
"""So many new objects before it looks at them; Python's own 700 are a few calls' worth."""
YOUNGER_COLLECTIONS = 20
"""So many collections of one generation before the next older one is looked at too."""


def set_for_daemon() -> None:
    """Leave alone what is there now, as it stays, and look at the rest less often.

    Nearly all that a daemon makes goes without the collector. Each look costs time for everything young, which during a
    listing is all that the listing brought.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG_OBJECTS, YOUNGER_COLLECTIONS, YOUNGER_COLLECTIONS)
