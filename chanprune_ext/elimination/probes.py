"""What the network's outputs say of one refitted layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from ..analysis.calls import run_model, steady_calls
from ..compensation.ledger import Ledger
from ..compensation.outputs import DeviationMeter, output_tensors

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["Probe", "convex_steps", "loss_curve"]


class Probe:
    """Measures how far the outputs move when some weights are changed for a moment.

    Args:
        model: The network; left as it is.
        batches: Inputs to measure on.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Any]) -> None:
        self._model = model
        self._batches = batches
        with steady_calls(model), torch.no_grad():
            self._expected = [output_tensors(run_model(model, batch)) for batch in batches]

    def loss(self, change: Callable[[Ledger], None]) -> float:
        """Mean KL divergence of the outputs, or their squared relative error where none is defined.

        Args:
            change: Changes weights, and notes in the ledger what they were.
        """
        ledger, meter = Ledger(), DeviationMeter()
        with steady_calls(self._model), torch.no_grad():
            try:
                change(ledger)
                for batch, expected in zip(self._batches, self._expected, strict=True):
                    meter.add(expected, output_tensors(run_model(self._model, batch)))
            finally:
                ledger.restore()
        found = meter.deviation()
        return found.relative_l2**2 if found.kl is None else found.kl


def loss_curve(error: np.ndarray, points: Sequence[tuple[float, float]]) -> np.ndarray:
    """The network's loss for every layer error, from losses measured at a few of them.

    Between the points loss and error follow a power law; before the first one, the loss grows in
    proportion to the error, as it does for small errors.

    Args:
        error: Squared error after each removal, rising.
        points: Pairs of a squared error and the measured loss.
    """
    tiny = 1e-12
    known = sorted((max(e, tiny), max(loss, tiny)) for e, loss in points)
    log_errors = np.log([e for e, _ in known])
    log_losses = np.maximum.accumulate(np.log([loss for _, loss in known]))
    x = np.log(np.maximum(error, tiny))
    curve = np.interp(x, log_errors, log_losses)
    below, above = x < log_errors[0], x > log_errors[-1]
    curve[below] += x[below] - log_errors[0]
    curve[above] += x[above] - log_errors[-1]
    return np.exp(curve)


def convex_steps(total: np.ndarray) -> np.ndarray:
    """Steps of the largest convex curve below a rising one that starts at 0, strictly rising.

    A greedy choice takes several cheap steps behind a dear one in one go; on the convex curve they
    all cost the same.
    """
    heights = np.concatenate([[0.0], total])
    corners = [0]
    for i in range(1, len(heights)):
        while len(corners) > 1:
            a, b = corners[-2], corners[-1]
            if (heights[b] - heights[a]) * (i - a) < (heights[i] - heights[a]) * (b - a):
                break
            corners.pop()
        corners.append(i)
    curve = np.interp(np.arange(len(heights)), corners, heights[corners])
    steps = np.maximum.accumulate(np.maximum(np.diff(curve), 0.0))
    # Equal steps keep their order: a hair's breadth apart.
    hair = 1e-9 * max(float(steps.max(initial=0.0)), 1e-30)
    rising: np.ndarray = steps + hair * np.arange(len(steps)) / max(1, len(steps))
    return rising
