"""How the scores of a group are made comparable with those of other groups."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from chanprune_ext.criteria.members import normalised

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["NORMALISATIONS"]


def _lamp(score: np.ndarray) -> np.ndarray:
    """A score's square as a share of those that are still there when it goes.

    The best of every group gets 1, so that none loses all it has. Squares, for scores are norms
    there; a score below zero counts as zero.
    """
    squares = np.square(np.maximum(score, 0.0))
    rising = np.argsort(squares, kind="stable")
    remaining = np.cumsum(squares[rising][::-1])[::-1]
    shares = np.zeros(len(score))
    np.divide(squares[rising], remaining, out=shares, where=remaining > 0)
    result = np.empty_like(shares)
    result[rising] = shares
    return result


def _over(unit: Callable[[np.ndarray], float]) -> Callable[[np.ndarray], np.ndarray]:
    """Divides scores by one number, if it is any."""

    def divided(score: np.ndarray) -> np.ndarray:
        size = unit(score)
        return score / size if size > 0 else score

    return divided


# Scores of one group, one a unit -> what is ranked beside those of other groups, in the same order.
NORMALISATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "mean": normalised,
    "max": _over(lambda score: float(np.max(np.abs(score)))),
    "l2": _over(lambda score: float(np.linalg.norm(score))),
    "lamp": _lamp,
    "none": lambda score: score,
}
