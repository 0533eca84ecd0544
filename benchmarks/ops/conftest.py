"""Timing with bytes: every row says how much memory had to move and how fast that was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from interleaved import Job, ReplayTimer, bandwidth, durations

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

Compare = Callable[[str, str, Callable[[], Job]], None]

_HERE = Path(__file__).parent
_replay = ReplayTimer()
_times: dict[str, tuple[int, dict[str, list[float]]]] = {}
_bandwidths: dict[torch.device, dict[str, float]] = {}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if _HERE in item.path.parents:
            item.add_marker(pytest.mark.benchmark(timer=_replay))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every device of this machine."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device(request.param)


@pytest.fixture
def compare(benchmark: BenchmarkFixture, device: torch.device) -> Compare:
    """Reports one variant of a job whose variants are all timed, interleaved, at its first one.

    Adds to the row: the bytes, GB/s at the median, their percentage of the copy speed and of the
    read speed measured in this process, and the number of threads.
    """

    def run(group: str, variant: str, make: Callable[[], Job]) -> None:
        benchmark.group = group
        if benchmark.disabled:  # a check that everything runs
            job = make()
            if variant in job.variants:
                benchmark(job.variants[variant])
            return
        if group not in _times:
            torch.compiler.reset()  # beyond a few shapes it would silently run the eager code
            job = make()
            _times[group] = job.bytes, durations(job.variants, device)
        moved, times = _times[group]
        if variant not in times:
            pytest.skip(f"{variant} is not there for {group}")
        if device not in _bandwidths:
            _bandwidths[device] = bandwidth(device)
        _replay.load(times[variant])
        benchmark.pedantic(lambda: None, rounds=len(times[variant]), iterations=1)
        speed = moved / benchmark.stats.stats.median
        benchmark.extra_info.update(
            bytes=moved,
            gb_per_s=round(speed / 1e9, 2),
            percent_of_copy=round(100 * speed / _bandwidths[device]["copy"], 1),
            percent_of_read=round(100 * speed / _bandwidths[device]["read"], 1),
            copy_gb_per_s=round(_bandwidths[device]["copy"] / 1e9, 2),
            read_gb_per_s=round(_bandwidths[device]["read"] / 1e9, 2),
            threads=torch.get_num_threads(),
        )

    return run
