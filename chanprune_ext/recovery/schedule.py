"""Learning rate over a run: linear warm-up, then half a cosine down to zero."""

from __future__ import annotations

import math

__all__ = ["learning_rate"]


def learning_rate(
    step: int, total: int, warmup: int, peak: float, hold: int | None = None
) -> float:
    """Learning rate of update ``step`` out of ``total``.

    ``peak * (step + 1) / (warmup + 1)`` while ``step < warmup``, afterwards
    ``peak * (1 + cos(pi * (step - warmup) / (total - warmup))) / 2``: the peak itself at
    ``step == warmup``, zero after the last update (cosine annealing: Loshchilov and Hutter 2017).

    Args:
        step (int): number of updates already made, ``0 <= step <= total``.
        total (int): number of updates of the whole run.
        warmup (int): number of updates below the peak, ``0 <= warmup < total``.
        peak (float): highest learning rate.
        hold (int, optional): update after which the rate stays as it is. Default: None, never.
    """
    if hold is not None:
        step = min(step, hold)
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    return peak * (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2
