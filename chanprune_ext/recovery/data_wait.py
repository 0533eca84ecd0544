"""How long a run waits for its data."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, TypeVar

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__all__ = ["DataWait"]

T = TypeVar("T")


class DataWait:
    """Adds up the time in which nothing is computed because the next batch is not there yet.

    On a CPU this is the time that fetching takes. A GPU is given its work ahead of time, so that a
    program may wait for data while the GPU is still busy; there, it is the time between the end of
    the work that was given and the arrival of the batch, measured by events of the GPU itself.

    Attributes:
        seconds (float): so far; on a GPU up to the last :meth:`settle`.

    Args:
        device (torch.device): what computes.
    """

    def __init__(self, device: torch.device) -> None:
        self.seconds = 0.0
        self._device = device
        self._gaps: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def timed(self, batches: Iterable[T]) -> Iterator[T]:
        """Hands the batches on."""
        iterator = iter(batches)
        while True:
            done = self._event()
            started = time.perf_counter()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            arrived = self._event()
            if done is None or arrived is None:
                self.seconds += time.perf_counter() - started
            else:
                self._gaps.append((done, arrived))
            yield batch

    def settle(self) -> None:
        """Takes in what events have measured; waits for the GPU."""
        for done, arrived in self._gaps:
            arrived.synchronize()
            self.seconds += done.elapsed_time(arrived) / 1000
        self._gaps.clear()

    def _event(self) -> torch.cuda.Event | None:
        if self._device.type != "cuda":
            return None
        event: torch.cuda.Event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event
