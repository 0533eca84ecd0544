"""Operators against what they replace, where a way of theirs once took many times as long."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any

import pytest
import torch

from chanprune_ext.ops import channel_norms, slice_channels

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = [
    pytest.mark.slow,  # not by itself, but a machine that other work keeps busy says nothing
    pytest.mark.skipif(
        "asan" in os.environ.get("LD_PRELOAD", ""), reason="only ours would carry a sanitizer"
    ),
]


def shortest_times(*calls: Callable[[], Any]) -> list[float]:
    """Seconds of each call, turn by turn, so that a busy machine slows all alike."""
    times = [float("inf")] * len(calls)
    for _ in range(15):
        for i, call in enumerate(calls):
            start = time.perf_counter()
            call()
            times[i] = min(times[i], time.perf_counter() - start)
    return times


@pytest.mark.parametrize(
    "view",
    [lambda w: w[:, ::2], lambda w: w[:, :1].expand(512, 512)],
    ids=["every other", "one repeated"],
)
def test_norms_of_channels_that_lie_apart(view):
    weight = view(torch.randn(512, 512))
    ours, theirs = shortest_times(lambda: channel_norms([weight], [1]), lambda: weight.abs().sum(0))
    assert ours < 3 * theirs  # it was 15 times as long


@pytest.mark.parametrize("size", [4096, 262_144])
def test_slices_of_vectors(size):
    vector = torch.randn(size)
    kept = torch.randperm(size)[: size // 2].sort().values
    ours, theirs = shortest_times(
        lambda: slice_channels([vector], [kept], [None]), lambda: vector.index_select(0, kept)
    )
    assert ours < 3 * theirs + 2e-5  # a call has its price; it was up to 36 times as long
