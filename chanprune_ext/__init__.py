"""Structured channel pruning for PyTorch that keeps the accuracy.

pruned = chanprune_ext.prune(model, example_inputs, ratio=0.5)
"""

from chanprune_ext.allocation import Budget
from chanprune_ext.analysis import register_rule
from chanprune_ext.checkpoint import load, save
from chanprune_ext.compensation import compensate
from chanprune_ext.elimination import elimination
from chanprune_ext.errors import ChanpruneError
from chanprune_ext.export import export
from chanprune_ext.plan import PruningPlan, plan_of
from chanprune_ext.pruning import plan, prune
from chanprune_ext.reconstruction import reconstruct
from chanprune_ext.recovery import Recipe, prune_progressively, recover, sparsify
from chanprune_ext.search import prune_within
from chanprune_ext.sensitivity import sensitivity

__version__ = "0.1.0"

__all__ = [
    "Budget",
    "ChanpruneError",
    "PruningPlan",
    "Recipe",
    "__version__",
    "compensate",
    "elimination",
    "export",
    "load",
    "plan",
    "plan_of",
    "prune",
    "prune_progressively",
    "prune_within",
    "reconstruct",
    "recover",
    "register_rule",
    "save",
    "sensitivity",
    "sparsify",
]
