"""Timing with bytes: every row says how much memory had to move and how fast that was."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

Moved = Callable[[int, Callable[[], Any]], None]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every device of this machine."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device(request.param)


def _copy_speed(device: torch.device) -> float:
    """Bytes read and written per second by the fastest of a few large copies."""
    source = torch.ones(2**26, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(8):
        start = time.perf_counter()
        target.copy_(source)
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * source.numel() * source.element_size() / best


_copy_speeds: dict[torch.device, float] = {}


@pytest.fixture
def moved(benchmark: BenchmarkFixture, device: torch.device) -> Moved:
    """Times a call that must move the given number of bytes; one warm-up call comes first.

    Adds to the row: the bytes, GB/s at the median, and their percentage of the copy speed measured
    in this process.
    """

    def run(bytes_to_move: int, call: Callable[[], Any]) -> None:
        def timed() -> None:
            call()
            if device.type == "cuda":
                torch.cuda.synchronize()

        timed()
        benchmark(timed)
        benchmark.extra_info["bytes"] = bytes_to_move
        if benchmark.stats is not None:  # None with --benchmark-disable
            if device not in _copy_speeds:
                _copy_speeds[device] = _copy_speed(device)
            speed = bytes_to_move / benchmark.stats.stats.median
            benchmark.extra_info["gb_per_s"] = round(speed / 1e9, 2)
            benchmark.extra_info["percent_of_copy"] = round(100 * speed / _copy_speeds[device], 1)

    return run
