"""Takes the time of something that is done here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter

from .timings import Timing


@contextmanager
def measuring(timing: Timing) -> Iterator[None]:
    """Count what the block does, and whether it fails with an OSError."""
    timing.started += 1
    began = perf_counter()
    try:
        yield
    except OSError as error:
        timing.failed(error.errno or 0)
        raise
    finally:
        timing.took(perf_counter() - began)
