"""Redundancy instead of size: filters near the geometric median can be replaced by the others."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from chanprune_ext.analysis.stand_ins import tensors_of
from chanprune_ext.ops.accumulation import widened

from .members import Scores, chosen_members, joined, normalised, unit_slices

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chanprune_ext.analysis import CouplingGroup

__all__ = ["fpgm"]

_ROWS = 1024  # of the distance matrix at a time


def fpgm(model: nn.Module, groups: Sequence[CouplingGroup], seed: int) -> Scores:
    """Sum of the Euclidean distances to all other filters (He et al. 2019, CVPR, FPGM).

    ``score_u = sum_v |w_u - w_v|``, ``w`` the filters that make the channels. Of several layers
    that make them together each is normalised to mean 1 and they are averaged.
    """
    tensors = tensors_of(model)
    scores = []
    for group in groups:
        parts = [
            normalised(_distances(unit_slices(model, m)).cpu().numpy())
            for m in chosen_members(group, tensors, "makers")
        ]
        scores.append(joined(parts, "mean", group.units))
    return scores


def _distances(rows: Tensor) -> Tensor:
    if rows.is_complex():  # as far apart as the pairs of real numbers that they are
        rows = torch.cat([rows.real, rows.imag], 1)
    rows = widened(rows)
    # Exact, not through a matrix product: near filters are what the score is about.
    mode = "donot_use_mm_for_euclid_dist"
    sums = [torch.cdist(part, rows, compute_mode=mode).sum(1) for part in torch.split(rows, _ROWS)]
    return torch.cat(sums).double()
