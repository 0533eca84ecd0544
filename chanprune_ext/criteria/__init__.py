"""How important is a channel: one score per unit of each coupling group, high = keep.

Criteria that need nothing but the weights go by their name, ``plan(..., criterion="l1")``; those
that need data are made first, ``plan(..., criterion=criteria.taylor(batches))``. docs/criteria.md
has the formulae and what each is good for.
"""

from .activations import activation, fluctuation
from .geometric import fpgm
from .gradients import hessian, taylor
from .magnitude import bn_scale, l1, l2, linf, magnitude, random
from .scoring import CRITERIA, DATA_CRITERIA, Criterion, score_groups

__all__ = [
    "CRITERIA",
    "DATA_CRITERIA",
    "Criterion",
    "activation",
    "bn_scale",
    "fluctuation",
    "fpgm",
    "hessian",
    "l1",
    "l2",
    "linf",
    "magnitude",
    "random",
    "score_groups",
    "taylor",
]
