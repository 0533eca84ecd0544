from __future__ import annotations

import itertools
import math

import pytest

from chanprune_ext.recovery.schedule import learning_rate


def test_every_value_of_a_short_schedule() -> None:
    rates = [learning_rate(step, total=8, warmup=2, peak=0.3) for step in range(9)]
    cosine = [0.15 * (1 + math.cos(math.pi * k / 6)) for k in range(7)]
    assert rates == pytest.approx([0.1, 0.2, *cosine])
    assert rates[2] == 0.3
    assert rates[5] == pytest.approx(0.15)
    assert rates[8] == pytest.approx(0, abs=1e-15)


def test_without_warmup_it_starts_at_the_peak_and_falls_all_the_way() -> None:
    rates = [learning_rate(step, total=50, warmup=0, peak=2.0) for step in range(51)]
    assert rates[0] == 2.0
    assert all(a > b for a, b in itertools.pairwise(rates))
