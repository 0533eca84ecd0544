"""From the indices that parameters keep back to the labels that went."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from chanprune_ext.analysis.tracer import NORMALISED

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from torch import Tensor

    from chanprune_ext.analysis import Analysis

__all__ = ["removed_labels", "removes_normalised"]


def removed_labels(
    analysis: Analysis,
    kept: Mapping[str, Mapping[int, Tensor]],
    *,
    without: Collection[str] = (),
) -> np.ndarray | None:
    """Bool (labels,): the label classes that leave exactly ``kept`` of every parameter.

    None where no choice of units of ``analysis`` does. Entries in ``without`` are not looked at.
    """
    masks: dict[str, dict[int, np.ndarray]] = {}
    for entry, dims in kept.items():
        for dim, index in dims.items():
            stays = np.zeros(analysis.trace.shapes[entry][dim], dtype=bool)
            stays[index.numpy()] = True
            if not stays.all():
                masks.setdefault(entry, {})[dim] = stays
    units = {}
    for group in analysis.groups:
        gone = np.ones(group.units, dtype=bool)
        for member in group.members:
            if member.entry not in without:
                mask = masks.get(member.entry, {}).get(member.dim)
                gone &= False if mask is None else ~mask[member.indices].any(axis=1)
        if gone.any():
            units[group.index] = gone
    removed = analysis.removed_labels(units)
    found = {e: dims for e, dims in analysis.kept_masks(removed).items() if e not in without}
    same = found.keys() == masks.keys() and all(
        found[e].keys() == masks[e].keys()
        and all(np.array_equal(found[e][d], masks[e][d]) for d in masks[e])
        for e in masks
    )
    return removed if same else None


def removes_normalised(analysis: Analysis, removed: np.ndarray) -> bool:
    """Whether a layer takes a statistic over something that is removed."""
    roots = np.flatnonzero(removed)
    return bool((analysis.trace.store.flags(roots) & NORMALISED).any())
