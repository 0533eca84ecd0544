"""Ratios that name one group each, for the ``ratios`` argument of :func:`chanprune_ext.plan`."""

from __future__ import annotations

import glob
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__all__ = ["exact_ratios"]


def exact_ratios(names: Iterable[str], wanted: Mapping[str, float]) -> dict[str, float]:
    """A mapping from globs to ratios under which each group gets its own ratio.

    A group is named by its first producer. That may make channels of earlier groups as well, never
    of later ones: told from the last to the first, each group has the last word on itself.

    Args:
        names: Names of all groups of a model, in execution order.
        wanted: Name -> ratio in [0, 1); groups that are not mentioned lose nothing.
    """
    return {glob.escape(name): wanted.get(name, 0.0) for name in reversed(list(names))}
