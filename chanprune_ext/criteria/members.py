"""From members to units: which slices of which tensors speak for a unit, and how they are joined.

A group's members *make* its channels (filters, role ``"out"``), *read* them (the slices of the next
layers along their input, role ``"in"``) or go *with* them (biases, batch norms).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from chanprune_ext.analysis.stand_ins import tensors_of
from chanprune_ext.errors import InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from chanprune_ext.analysis import CouplingGroup
    from chanprune_ext.analysis.groups import Member

__all__ = ["REDUCTIONS", "Scores", "chosen_members", "joined", "normalised", "unit_slices"]

Scores: TypeAlias = "list[np.ndarray]"
REDUCTIONS: dict[str, Callable[..., np.ndarray]] = {"sum": np.sum, "mean": np.mean, "max": np.max}

_ROLES = {"makers": "out", "readers": "in"}


def chosen_members(group: CouplingGroup, tensors: dict[str, Tensor], members: str) -> list[Member]:
    """The weights (two dims and more) of a group that speak for it.

    Args:
        group: The group.
        tensors: Tensors of the model by entry.
        members: ``"makers"`` or ``"readers"``. Where a group has none of them the others count.
    """
    weights = [m for m in group.members if m.role != "with" and tensors[m.entry].dim() > 1]
    return [m for m in weights if m.role == _ROLES[members]] or weights


def unit_slices(model: nn.Module, member: Member) -> Tensor:
    """What each unit has of a member, as rows (units, n)."""
    tensor = tensors_of(model)[member.entry].detach()
    index = np.ascontiguousarray(member.indices)
    rows = tensor.movedim(member.dim, 0).flatten(1)
    return rows[torch.from_numpy(index.ravel()).to(rows.device)].reshape(len(index), -1)


def normalised(score: np.ndarray) -> np.ndarray:
    """Scores of a member, or of a group, with mean 1: those of other sizes weigh the same."""
    mean = float(np.mean(np.abs(score)))
    return score / mean if mean > 0 else score


def joined(parts: Sequence[np.ndarray], reduction: str, units: int) -> np.ndarray:
    """One score per unit out of those of all members.

    Raises:
        InvalidArgumentError: There is no such reduction.
    """
    if reduction not in REDUCTIONS:
        raise InvalidArgumentError(
            f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}"
        )
    if not parts:
        return np.zeros(units)
    return np.asarray(REDUCTIONS[reduction](np.stack(parts), axis=0))
