"""What each ATen operation does to channel labels: one file per family, a few lines per rule."""

from chanprune_ext.analysis.rules import (
    attention,
    contraction,
    creation,
    indexing,
    movement,
    normalisation,
    pointwise,
    reduction,
    reshape,
    scattering,
    solving,
    spatial,
    spectral,
    windows,
)
from chanprune_ext.analysis.rules.registry import apply_rule, give_up, register_rule

__all__ = [
    "apply_rule",
    "attention",
    "contraction",
    "creation",
    "give_up",
    "indexing",
    "movement",
    "normalisation",
    "pointwise",
    "reduction",
    "register_rule",
    "reshape",
    "scattering",
    "solving",
    "spatial",
    "spectral",
    "windows",
]
