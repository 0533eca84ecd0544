"""The curve from layer error to loss, and its convex hull."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chanprune_ext.elimination.probes import convex_steps, loss_curve


def test_loss_grows_in_proportion_before_and_after_the_measured_points():
    curve = loss_curve(np.array([0.5, 1.0, 4.0, 8.0]), [(1.0, 0.1), (4.0, 1.6)])
    assert curve.tolist() == pytest.approx([0.05, 0.1, 1.6, 3.2])


def test_loss_follows_a_power_law_between_the_points():
    # From (1, 0.1) to (4, 1.6) the loss grows with the square of the error.
    assert loss_curve(np.array([2.0]), [(1.0, 0.1), (4.0, 1.6)])[0] == pytest.approx(0.4)


def test_loss_never_falls():
    curve = loss_curve(np.array([1.0, 2.0, 3.0]), [(1.0, 0.5), (2.0, 0.3), (3.0, 0.6)])
    assert (np.diff(curve) >= 0).all()


def test_hull_by_hand():
    # Total loss 0, 4, 4.5, 9: the two first steps cost 2.25 each on the hull.
    assert convex_steps(np.array([4.0, 4.5, 9.0])).tolist() == pytest.approx([2.25, 2.25, 4.5])


@given(st.lists(st.floats(0, 100), min_size=1, max_size=30))
@settings(max_examples=100, deadline=None)
def test_hull_lies_below_touches_the_end_and_rises(increases):
    total = np.cumsum(increases)
    steps = convex_steps(total)
    assert (np.diff(steps) > 0).all()
    hull = np.cumsum(steps)
    assert (hull <= total * (1 + 1e-6) + 1e-6).all()
    assert hull[-1] == pytest.approx(total[-1], rel=1e-6, abs=1e-6)
