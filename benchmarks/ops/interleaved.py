"""Times several ways of doing one job in turns, so that whatever disturbs the machine disturbs all
of them, and hands the durations to pytest-benchmark afterwards. What comes behind a variant with
large temporaries finds empty caches and a busy system: the order changes from round to round, and
each has an untimed call before its turn.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

Call = Callable[[], Any]

_ROUND_SECONDS = 2e-3  # a round repeats short calls until it lasts about this long
_GROUP_SECONDS = 2.0
_MIN_ROUNDS, _MAX_ROUNDS = 9, 101


@dataclass
class Job:
    """One row group: the bytes that must move and the ways to do it.

    Attributes:
        bytes: least number of bytes that have to be read and written.
        variants: name -> call.
    """

    bytes: int
    variants: dict[str, Call]


class ReplayTimer:
    """A timer for pytest-benchmark's pedantic mode that tells recorded durations, one a round."""

    def __init__(self) -> None:
        self._ticks: Iterator[float] = iter(())

    def load(self, durations: list[float]) -> None:
        """Sets what the next rounds will have taken, in seconds."""
        self._ticks = (tick for duration in durations for tick in (0.0, duration))

    def __call__(self) -> float:
        return next(self._ticks)


def _timed(call: Call, repeats: int, device: torch.device) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats


def durations(variants: dict[str, Call], device: torch.device) -> dict[str, list[float]]:
    """Seconds per call of every variant, one entry a round."""
    repeats, total = {}, 0.0
    for name, call in variants.items():
        for _ in range(3):  # compiles, fills caches
            _timed(call, 1, device)
        once = min(_timed(call, 1, device) for _ in range(3))
        repeats[name] = max(1, int(_ROUND_SECONDS / once))
        total += once * (1 + repeats[name])
    rounds = min(_MAX_ROUNDS, max(_MIN_ROUNDS, int(_GROUP_SECONDS / total)))
    times: dict[str, list[float]] = {name: [] for name in variants}
    order = random.Random(0)
    for _ in range(rounds):
        for name in order.sample(list(variants), len(variants)):
            _timed(variants[name], 1, device)  # finds in the caches what it leaves there itself
            times[name].append(_timed(variants[name], repeats[name], device))
    return times


def bandwidth(device: torch.device) -> dict[str, float]:
    """Bytes a second of copying and of reading 256 MB, the best of a few turns."""
    source = torch.ones(2**26, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    size = source.numel() * source.element_size()
    calls: dict[str, tuple[Call, int]] = {
        "copy": (lambda: target.copy_(source), 2 * size),
        "read": (source.sum, size),
    }
    return {
        name: moved / min(_timed(call, 1, device) for _ in range(12))
        for name, (call, moved) in calls.items()
    }
