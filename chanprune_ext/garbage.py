"""Python's cycle collector, held off for a while."""

from __future__ import annotations

import gc
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["collector_paused"]


@contextmanager
def collector_paused() -> Iterator[None]:
    """No search for reference cycles while many small objects are made.

    A trace makes some ten thousand objects that live until it is done and are in no cycle. To the
    collector that looks like a reason to go through everything the process holds, with torch
    imported several hundred thousand objects: longer than pruning a small network takes.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
